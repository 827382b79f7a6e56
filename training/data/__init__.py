"""Parquet and text files to batches of rows, and a generator of such files.

On the way of interactions: `files` finds Parquet files and reads row groups, `columns` turns Arrow arrays into numpy,
`interactions` is the stream of rows with their splits, `vocabularies` give ids rows, `batches` are what a step takes.
`ragged` holds lists of different lengths, `histories` the items of each user, `dense` the means of numbers; `text`
reads texts and documents; `synthetic` generates interactions.
"""
