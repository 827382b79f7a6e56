"""How fast the library is, beside what it replaces: `python -m dpq_rec.bench NAME`. Lines of results, and tables."""
