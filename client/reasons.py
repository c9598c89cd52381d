"""Why a file or series is left out: every code that `ScanError` carries in reading, with its meaning for a person.

`docs/reading.md` lists the same codes with the rules behind them; a test holds the two and the code together.
"""

from collections.abc import Mapping, Set

PASSING: Set[str] = frozenset(("timed_out", "reader_crashed", "out_of_memory", "missing_file", "cannot_open"))
"""What may be gone next time: a scan that was left out for it is tried again."""

OF_DECODERS: Set[str] = frozenset(("needs_extra_jpeg12", "cannot_decode"))
"""What another decoder may mend."""

REASONS: Mapping[str, str] = {
    # Files that are no scan or cannot be opened as one
    "not_an_image": "neither DICOM nor NIfTI, PNG, JPEG or TIFF",
    "name_contradicts_content": "called .dcm but is a picture or NIfTI: the export went wrong",
    "empty_file": "holds no byte",
    "missing_file": "a table lists it, and there is no such file",
    "cannot_open": "this user may not read it, its disk fails, or it is a link to nothing",
    "linked_folder": "a link to a folder: links are not followed; check the folder itself",
    "cannot_write": "was read, but its result could not be written",
    "damaged_header": "its header cannot be read",
    "dicomdir": "an index of a DICOM medium; the files it lists are found without it",
    "reader_failed": "the reader failed in an unforeseen way",
    "timed_out": "took longer than the time limit for one file",
    "reader_crashed": "made its decoder crash",
    "out_of_memory": "needs more memory than a reader may take",
    "too_large": "claims more voxels than a scan may have",
    # Pixels
    "no_pixels": "a document without pixels: report, structure set, presentation state, ...",
    "truncated_pixels": "holds fewer pixels than its header says",
    "cannot_decode": "its compressed pixels cannot be decoded",
    "needs_extra_jpeg12": "12-bit JPEG Extended: install the extra 'jpeg12' (pylibjpeg-libjpeg, GPL) to read it",
    "bad_pixel_description": "its header describes no possible image",
    "binary_image": "black and white only: a mask or a scanned page",
    "colour_image": "a coloured picture, not a grey one stored in colours",
    "label_map": "has at most 16 different values: a mask or segmentation, not a picture",
    "blank": "shows one value everywhere",
    "not_finite": "more than half of its values are no numbers",
    "other_rank": "an image where volumes are asked for, or a volume where images are",
    # Objects that are no plain pictures of a body
    "unsupported_object": "an object other than CT, MR, PET or X-ray: ultrasound, segmentation, dose, slide, ...",
    "secondary_capture": "a secondary capture: screen shots and scanned papers, often with names burned in",
    "burned_in_annotation": "has text burned into its pixels, as its header says",
    "localizer": "a localizer (scout)",
    "dose_or_screen": "a dose report or a screen as image",
    "derived_image": "made from another series: reformat, projection, rendering, crop",
    "parameter_map": "a computed map (perfusion, diffusion, subtraction, field map), not a picture",
    "phase_image": "phase, real or imaginary part of an MR",
    "mosaic": "slices laid out in one picture",
    "multi_frame_xray": "an X-ray film or tomosynthesis, not a radiograph",
    "no_rescale": "an unsigned CT that does not say how its values become Hounsfield units",
    # Patients
    "no_patient_id": "has no PatientID; give the source a patient_pattern or a table",
    "no_patient_match": "the source's table or patient_pattern gives no patient for it",
    "two_patients_in_series": "one series under two patients: whose it is cannot be known",
    # Series and geometry
    "label_unfit": "the table or folder of labels names no path, patient, class or channel there can be, or no label",
    "other_channel": "another channel of its case (CASE_0000, CASE_0001, ...) than the one that the model reads",
    "channels_apart": "its channels (of a task that has several) do not lie on one grid; resample them onto one, or "
    "set task.other_grids: resample; where it is set, they hardly meet, or a file does not say where it lies",
    "lacks_channel": "lacks a channel of the task: a file of its case (CASE_0000, CASE_0001, ...), a volume of its one "
    "NIfTI file, or a cell of its table",
    "unlike_channel": "the file of a channel says that it is CT, MR or PET, and the channel's name begins with another "
    "of them; files or columns may be swapped",
    "unknown_channel": "one image or volume where a scan is several, and its name does not say which of them it is, "
    "or no file beside it is called CASE_0000",
    "mask_unfit": "its mask does not go with it: another geometry or kind, not stored turned as it is, other values, "
    "empty, or not to be read",
    "duplicate": "a copy of a file, slice or scan that is used",
    "several_scans": "holds several scans where one was named",
    "later_time_point": "a later time point of a series whose first one is used",
    "slice_beside_volume": "a lone slice in a study with a volume: test shot or bolus watch",
    "lone_slice": "a single slice of a broken series, or where there are as many volumes of its modality",
    "no_geometry": "does not say where in the patient it lies",
    "bad_geometry": "says impossible things about where it lies, or lies on a skewed grid",
    "bad_spacing": "its voxels, or all of it, are absurdly small or large",
    "too_few_slices": "two slices are no volume",
    "missing_slices": "slices are missing; a study may allow a few to be interpolated (plan.missing_slices)",
    "uneven_spacing": "slices at uneven distances",
    "uneven_offsets": "slices that lie beside each other unevenly",
    "tilt_too_steep": "a gantry tilt of more than 45 degrees",
}

FLAGS: Mapping[str, str] = {
    "duplicates_dropped": "copies of slices were left out",
    "first_of_several_times": "the first of several time points or volumes in it is used",
    "gantry_tilt_corrected": "its slices were moved in their plane, for the gantry was tilted",
    "missing_slices_interpolated": "missing slices were made up (plan.missing_slices)",
    "orientation_assumed": "does not say how it lies in the patient; taken as its axes stand",
    "patient_assumed": "nothing says whose it is: it counts as a patient of its own",
    "qform_and_sform_disagree": "says two things about how it lies in the patient; the sform is used",
    "spacing_unknown": "does not say how large its pixels are",
    "split_at_spacing_change": "one of several volumes that a series of uneven distances was parted into",
}
"""What was done to a scan that is used, with its meaning for a person."""


def reason_of(error: Exception, otherwise: str) -> str:
    """`cannot_open` where the system failed, whose errors have a number, and which may not fail next time; else
    `otherwise`, for readers raise OSError for content, too."""
    return "cannot_open" if isinstance(error, OSError) and error.errno is not None else otherwise
