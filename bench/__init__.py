"""Claims about speed, one file each, on one harness: `python -m bench`.

A new claim is a file with its `COMPARISONS`, and its name in `CLAIMS` of __main__.py. What a whole re-estimation
costs against fvcore's is apart, as it takes minutes: `python -m bench.population_statistics`.
"""
