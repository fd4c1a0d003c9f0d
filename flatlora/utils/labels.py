"""The label of a token without loss."""

IGNORED_LABEL = -100  # `ignore_index` of torch's cross entropy, as transformers and TRL use it
