"""The fixes of this package as patches against `datasets`, and the check that keeps them so."""

LEFT_TO_THE_PACKAGE = {
    "datasets.formatting.np_formatter:NumpyFormatter._tensorize",
    "datasets.formatting.torch_formatter:TorchFormatter._tensorize",
    "datasets.formatting.jax_formatter:JaxFormatter._tensorize",
    "datasets.formatting.tf_formatter:TFFormatter._tensorize",
    "datasets.formatting.polars_formatter:PolarsFeaturesDecoder.decode_row",
    "datasets.formatting.polars_formatter:PolarsFeaturesDecoder.decode_column",
    "datasets.features.features:_check_if_features_can_be_aligned",
    "datasets:Dataset.add_item",
    "datasets:Dataset.add_column",
}
"""What this package still replaces on a library that has all patches: what no patch is written for yet."""

CHECKS_LEFT_TO_THE_PACKAGE = {
    # not in a patch yet
    "numpy_format_gives_arrays",
    "torch_format_gives_tensors",
    "jax_format_gives_arrays",
    "rgb_voxels_become_a_last_axis",
    "polars_format_gives_images",
    "datasets_that_differ_in_decode_can_be_concatenated",
    "items_with_images_can_be_added",
    "columns_of_images_can_be_added",
    "streams_may_begin_without_an_image",
    "bytes_win_over_a_file_of_that_name",
    "file_urls_are_embedded",
    "file_urls_and_archives_are_read",
    # estimates and means where this package counts: rows of a shard and of a row group
    "files_of_every_feature_count",
    "files_that_are_missing_count_as_nothing",
    "row_groups_follow_bytes",
    "save_to_disk_keeps_the_bound",
    # nothing is copied in a list either
    "bytes_are_not_copied",
    # the patch leaves out the whole column, this package the bytes only
    "no_statistics_on_volumes",
    "no_statistics_from_builders",
    # what a file looks like that is no image is said by this package only
    "pointers_and_error_pages_are_refused",
    "halves_of_pairs_are_refused",
    "what_is_no_image_is_named",
    "truncated_files_are_named",
    "bytes_behind_the_image_are_ignored",
    "a_damaged_header_is_named",
    "a_broken_link_is_named",
    # paths stay paths, and voxels keep their scaling, in more places than the patches reach
    "the_content_tells_the_format",
    "a_builder_that_yields_images_keeps_their_data",
    "map_keeps_what_was_not_modified",
    "map_keeps_what_was_not_modified_in_nested_columns",
    "an_edited_header_does_not_change_a_voxel",
}
"""Checks of `tests/test_stock.py` and `tests/test_nifti.py` that fail on it without this package."""
