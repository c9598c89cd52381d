"""What `unimiss-server init` writes to begin from, besides keys and certificates."""

SERVER = """\
# The coordinator's processes. Every setting and its meaning: server/server_config.py
address: "{address}"   # under which sites reach this machine; another host needs another `unimiss-server init`
# listen: "{listen}"   # what the public side binds to; "0.0.0.0" is every IPv4 address of this machine. Without this
# line it is that, or the host of `address` alone where that is a loopback one, as in a trial on one machine
"""

COORDINATOR = """\
# How every study is run: a coordinator file without what `unimiss-server run` adds (study, out, sites, keys, ledgers).
# Every setting and its meaning: server/coordinator_config.py
min_sites: 2
min_replies: 2
wait_s: 86400.0      # a day for sites to come, before the first round and in each try of a later one
deadline_s: 7200.0
"""

STUDY = """\
# A study for a first trial: the published architecture with small widths, small views, few prototypes.
# Every setting and its meaning: unimiss_core/study.py. What is not written here has the default that stands there.
# Copy it, change it, then: unimiss-server run MY_STUDY.yaml. Sites hold patients' data: read docs/privacy.md first.
name: first
seed: 0
model:
  size: nano
  image_size: [64, 64]
  volume_size: [16, 64, 64]
  prototypes: 512
plan:
  volume_spacing_mm: [4.0, 4.0, 4.0]   # (D, H, W): coarse, so that 64 voxels span a body
  image_longest_side: 256
  ct_window_hu: [-1000.0, 1000.0]
views:
  views: 2
  image_size: [64, 64]
  volume_size: [16, 64, 64]
objective:
  teacher_temperature: 0.02
  volume_teacher_temperature: 0.035
  teacher_momentum: [0.99, 1.0]
  slices_per_volume: 4
optimiser:
  lr: 5.0e-4
  warmup_steps: 100
schedule:
  rounds: 24
  local_steps: 50
  alternate: [1, 2]
batch:
  images: 32
  volumes: 4
"""
