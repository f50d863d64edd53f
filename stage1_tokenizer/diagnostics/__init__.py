"""Tools to examine a training or a tokenizer: alarms, views, the report page and the comparison of runs."""
