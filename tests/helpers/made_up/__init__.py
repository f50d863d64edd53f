"""Example kinds, one file each, as a contributor would write them; test_new_kinds.py adds them to a copy."""
