"""Least-squares refitting of weights after units were removed."""
