"""How fast the service is, beside what others would use: `python -m service.bench NAME`. Lines of results, pictures."""
