"""Loading models and running them over ragged batches."""
