"""Asking a trained model: multiple-choice accuracy, and one question by hand."""
