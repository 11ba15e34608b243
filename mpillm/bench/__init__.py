"""Measuring: jobs started from outside, their time and memory, and the peers they are held against."""
