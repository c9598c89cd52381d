"""What runs inside the hospital: reading scans, privacy, local training, the site's own policy."""
