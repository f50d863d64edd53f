"""Examinations of a training or a tokenizer: alarms, views, the report page, the comparison of runs."""
