"""Models of many widths trained with the same compute: which is the best for a budget?"""
