"""Rating pictures: pairs of them on a page of this machine, and every answer kept in preferences.jsonl."""
