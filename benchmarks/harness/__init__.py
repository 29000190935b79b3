"""What the claims share: data, models and problems; policies; runs and rows that survive a kill; tables, style, timing.

Uses the library and nothing of the claims.
"""
