"""A small Hugging Face Hub on loopback: the routes that fetching, pushing and datasets take; and commands run on it."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
LFS = (".safetensors", ".gguf", ".parquet", ".bin")
REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository: its commits, and the branches and tags that lead to them. ``fault`` is a status and an error code
    with which every request of it is answered; ``files_fault`` only those for files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    fault: tuple[int, str] | None = None
    files_fault: tuple[int, str] | None = None

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add or replace files; return the commit."""
        before = self.commits.get(self.refs.get(branch, ""), {})
        sha = hashlib.sha1(repr((len(self.commits), sorted({**before, **files}))).encode()).hexdigest()
        self.commits[sha] = {**before, **files}
        self.refs[branch] = sha
        return sha

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """The repositories by (kind, name), kind "models" or "datasets"; every request as "METHOD /path"; the uploads."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], kind: str = "models", **facts) -> str:
        """Make a repository with one commit, and return that."""
        self.repos[kind, name] = Repo(**facts)
        return self.repos[kind, name].commit(files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos["models", name]
        return repo.commits[repo.at(revision)]

    @property
    def downloaded(self) -> set[str]:
        """The names of the files that were fetched."""
        return {path.rpartition("/")[2] for path in self.requests if path.startswith("GET ") and "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._route("GET")

    def do_HEAD(self):
        self._route("HEAD")

    def do_POST(self):
        self._route("POST")

    def do_PUT(self):
        self._route("PUT")

    def _route(self, method):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        hub = self.server.hub
        hub.requests.append(f"{method} {path}")
        for pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                return function(self, hub, **found.groupdict())
        return self._error(404, "EntryNotFound")

    def _send(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status, code):
        self._send(status, b"{}", X_Error_Code=code, X_Error_Message=code, Content_Type="application/json")

    def _repo(self, hub, kind, name, revision=None):
        """The repository and its commit, or (None, None) with the error already sent."""
        repo = hub.repos.get((kind, name))
        if repo is None:
            self._error(401, "RepoNotFound")
        elif repo.fault:
            self._error(*repo.fault)
        elif revision is not None and repo.at(revision) is None:
            self._error(404, "RevisionNotFound")
        else:
            return repo, repo.at(revision or "main")
        return None, None

    def info(self, hub, kind, repo, revision=None):
        found, sha = self._repo(hub, kind, repo, revision)
        if found:
            siblings = [{"rfilename": path} for path in found.commits[sha]] if sha else []
            self._json({"id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, hub, kind, repo, revision, under):
        found, sha = self._repo(hub, kind, repo, revision)
        if found:
            files, folder = found.commits[sha], f"{(under or '').strip('/')}/".removeprefix("/")
            inside = [path for path in files if path.startswith(folder)]
            if under and not inside:
                self._error(404, "EntryNotFound")
            elif self.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
                self._json([entry(path, files[path]) for path in inside])
            else:  # what lies in folders is listed as the folders
                direct = [path for path in inside if "/" not in path[len(folder) :]]
                others = {folder + path[len(folder) :].partition("/")[0] for path in inside if path not in direct}
                folders = [dict(type="directory", path=path, size=0, oid="0" * 40) for path in sorted(others)]
                self._json([*folders, *(entry(path, files[path]) for path in direct)])

    def paths(self, hub, kind, repo, revision):
        found, sha = self._repo(hub, kind, repo, revision)
        if found:
            body = self.body.decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            files = found.commits[sha]
            self._json([entry(path, files[path]) for path in files if path in wanted])

    def resolve(self, hub, repo, revision, path, kind=None):
        found, sha = self._repo(hub, (kind or "models/").rstrip("/"), repo, revision)
        if not found:
            return
        if found.files_fault:
            self._error(*found.files_fault)
            return
        content = found.commits[sha].get(path)
        if content is None:
            self._error(404, "EntryNotFound")
            return
        facts = dict(ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=sha, Accept_Ranges="bytes")
        piece = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if piece:
            start, end = int(piece[1]), min(int(piece[2] or len(content)), len(content) - 1)
            facts["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self._send(206 if piece else 200, content, **facts, Content_Length=str(len(content)))

    def create(self, hub):
        asked = json.loads(self.body)
        if "authorization" not in {name.lower() for name in self.headers}:
            self._error(401, "Unauthorized")
            return
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        known = ("models", name) in hub.repos
        if not known:
            private = asked.get("private") is True or asked.get("visibility") == "private"
            hub.add(name, {".gitattributes": b""}, private=private)
        self._json({"url": f"{hub.url}/{name}", "name": name}, 409 if known else 200)

    def branch(self, hub, repo, name):
        found, sha = self._repo(hub, "models", repo)
        if found:
            status = 409 if name in found.refs else 200
            found.refs.setdefault(name, sha)
            self._json({}, status)

    def preupload(self, hub, repo, revision):
        found, _ = self._repo(hub, "models", repo, revision)
        if found:
            names = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [dict(path=name, uploadMode="lfs" if name.endswith(LFS) else "regular", shouldIgnore=False)
                     for name in names]  # fmt: skip
            self._json({"files": modes})

    def lfs_batch(self, hub, repo):
        asked = json.loads(self.body)
        objects = [dict(oid=o["oid"], size=o["size"], actions={"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}})
                   for o in asked["objects"]]  # fmt: skip
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, hub, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        hub.uploads[oid] = self.body
        self._send(200)

    def commit(self, hub, repo, revision):
        found, _ = self._repo(hub, "models", repo, revision)
        if not found:
            return
        files = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                hub.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = hub.uploads[value["oid"]]
        sha = found.commit(files, revision)
        self._json({"success": True, "commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def yaml(self, hub):
        self._json({"errors": [], "warnings": []})


def entry(path, content):
    """A file as the Hub lists it."""
    found = dict(type="file", path=path, size=len(content), oid=hashlib.sha1(content).hexdigest())
    if path.endswith(LFS):
        found["lfs"] = dict(oid=hashlib.sha256(content).hexdigest(), size=len(content), pointerSize=130)
    return found


KIND = r"/api/(?P<kind>models|datasets)/"
ROUTES = [
    (f"{KIND}{REPO}", Handler.info),
    (f"{KIND}{REPO}/revision/(?P<revision>.+)", Handler.info),
    (f"{KIND}{REPO}/tree/(?P<revision>[^/]+)(?P<under>/.*)?", Handler.tree),
    (f"{KIND}{REPO}/paths-info/(?P<revision>.+)", Handler.paths),
    (rf"/(?P<kind>datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (r"/api/repos/create", Handler.create),
    (f"/api/models/{REPO}/branch/(?P<name>.+)", Handler.branch),
    (f"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (f"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    (r"/api/validate-yaml", Handler.yaml),
]


@contextmanager
def running():
    """Yield a Hub that serves on a free port of loopback."""
    hub, server = Hub(), ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = hub, True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


# Runs commands in one process, after a statement, and prints their exit codes and what each wrote.
CHILD = """
import contextlib, io, json, sys, warnings
warnings.filterwarnings("ignore", message="cna_kernels: the CPU engine")  # of a checkout that is not built
exec(sys.argv[2])
from cna_kernels.model.cli import main
results = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
    results.append([code, out.getvalue(), err.getvalue()])
print("\\n" + json.dumps(results))
"""


def commands(hub, home, *words, before="", **environment):
    """Run commands with the Hub at ``hub`` and HF_HOME at ``home``. Return of each (exit code, stdout, stderr)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    kept |= dict(no_proxy="*", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), COLUMNS="400")
    command = [sys.executable, "-c", CHILD, json.dumps([[str(word) for word in each] for each in words]), before]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **environment}, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]
