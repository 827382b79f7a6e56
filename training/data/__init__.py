"""Parquet files to batches of rows, and a generator of such files.

`files` are what a folder holds, `partitions` what paths say, `columns` how a type of Arrow becomes numbers, `splits`
which row trains, `interactions` the stream of rows, `vocabularies` ids to rows, `batches` what a step takes, `dense`
statistics of numbers; `synthetic` and `synthetic_clicks` generate.
"""
