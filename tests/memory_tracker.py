"""A tracker that keeps what it receives in this process."""


class Memory:
    """A tracker of this process: its runs by id. `fails` is the round at which it raises."""

    def __init__(self, clients=False, fails=None, reads=True):
        self.clients, self.fails, self.reads, self.runs, self.opened = clients, fails, reads, {}, []

    def __repr__(self):
        return "Memory()"

    def check_tracker(self):
        self.checked = True

    def open_session(self, files, known, first):
        self.opened.append((known, first))
        key = known or f"run-{len(self.runs)}"
        self.runs.setdefault(key, {"rows": [], "parameters": files.parameters(), "status": "running", "files": []})
        return Session(self, key)


class Session:
    def __init__(self, tracker, key):
        self.tracker, self.id, self.run = tracker, key, tracker.runs[key]

    @property
    def last(self):
        return max((at for at, _ in self.run["rows"]), default=-1) if self.tracker.reads else None

    def log(self, rows):
        for at, values in rows:
            if at == self.tracker.fails:
                raise OSError("the store is full")
            self.run["rows"].append((at, dict(values)))

    def close(self, status, files):
        self.run |= {"status": status, "files": [] if files is None else [p.name for p in files.artifacts()]}
