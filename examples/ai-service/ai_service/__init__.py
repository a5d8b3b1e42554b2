"""A small AI service: takes a series by STOW-RS, segments and measures it, and returns DICOM SEG and SR."""
