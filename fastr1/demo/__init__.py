"""The whole job at toy size: generated clips with questions, a tiny base model, and the pipeline over both."""
