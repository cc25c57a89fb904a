"""Readers: one pure function per dataset format, row -> list of samples."""
