"""The `dpq-rec` command."""
