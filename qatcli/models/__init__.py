"""Where models come from (`source`) and how their blocks are found and run one at a time (`blocks`)."""
