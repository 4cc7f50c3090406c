"""The commands of ``vitcomposer``, one file each."""
