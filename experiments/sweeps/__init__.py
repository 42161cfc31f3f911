"""Sweeps of one hyperparameter over model sizes: does its optimum stay where it is?"""
