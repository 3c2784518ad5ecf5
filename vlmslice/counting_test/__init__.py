"""The counting test: what slicing does to what a model counts, on pictures that differ in one thing at a time."""
