"""From data sources to token windows.

files     rows of one local file (jsonl, json, parquet, arrow, text; gzip)
sources   rows of a recipe's data source: local files, globs, Hugging Face datasets
rows      a row checked and reduced to the text in it (text, alpaca, chat)
examples  that text to tokens and a loss mask (chat: chat templates; tokens: the types)
corpus    the documents of a source, split into training and validation
packing   fixed-length windows out of tokenized documents
windows   the training and validation windows of a stage
store     windows in a stage directory
text      token streams and windows for perplexity
"""

from qatcli.data.corpus import check_source
from qatcli.data.store import Windows, load_windows, save_windows
from qatcli.data.text import begin_windows, c4_windows, evaluation_windows, text_tokens
from qatcli.data.windows import WindowSet, sample_windows

__all__ = [
    "WindowSet",
    "Windows",
    "begin_windows",
    "c4_windows",
    "check_source",
    "evaluation_windows",
    "load_windows",
    "sample_windows",
    "save_windows",
    "text_tokens",
]
