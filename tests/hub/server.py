"""A small Hub on loopback: real HTTP, the endpoints that huggingface_hub uses to create, upload, list and download.

Repositories are folders; a commit is a copy of the last with its changes. Failures can be asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


class Hub:
    """State of the server.

    Attributes:
        repos: files of each repository by path, as last committed.
        commits: messages and changed paths, in order.
        failures: status codes to answer with instead, by the part of the path they apply to; used up from the front.
        token: the only one that may write.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.failures: dict[str, list[int]] = {}
        self.token = "hf_right"
        self.requests: list[str] = []
        self.validated: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else b""
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline().strip() or b"0", 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                status, content, headers = hub.answer(self.command, path, body, dict(self.headers))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", headers.get("Content-Length", str(len(content))))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_HEAD = _answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, verb: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        for part, codes in self.failures.items():
            if part in path and codes:
                return self._json({"error": "as asked for"}, codes.pop(0))
        writes = verb in ("POST", "PUT") and "/blob/" not in path
        if writes and {k.lower(): v for k, v in headers.items()}.get("authorization") != f"Bearer {self.token}":
            return self._json({"error": "Invalid username or password."}, 401)
        for pattern, handle in (
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", self._validate),
            (r"POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/.+", self._branch),
            (r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/.+", self._preupload),
            (r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"PUT /blob/(?P<oid>\w+)", self._put),
            (r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/.+", self._commit),
            (r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/[^/]+", self._tree),
            (r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/.+)?", self._info),
            (r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)", self._resolve),
        ):
            found = re.fullmatch(pattern, f"{verb} {path}")
            if found:
                return handle(body=body, **{k: v for k, v in found.groupdict().items() if v is not None})
        return self._json({"error": f"{verb} {path} is not served"}, 404)

    @staticmethod
    def _json(value: Any, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
        return status, json.dumps(value).encode(), {"Content-Type": "application/json"}

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if repo in self.repos:
            return self._json({"error": "exists", "url": f"{self.url}/{repo}"}, 409)
        self.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        # huggingface_hub 1.3 asks with "private", 2.4 with "visibility"
        self.private[repo] = asked.get("private") is True or asked.get("visibility") == "private"
        return self._json({"url": f"{self.url}/{repo}", "name": repo, "id": repo})

    def _validate(self, body: bytes) -> Any:
        asked = json.loads(body)
        self.validated.append(yaml.safe_load(asked["content"].split("---")[1]))
        return self._json({"errors": [], "warnings": []})

    def _branch(self, repo: str, body: bytes) -> Any:
        return self._json({})

    def _preupload(self, repo: str, body: bytes) -> Any:
        if repo not in self.repos:
            return self._json({"error": "no such repository"}, 404)
        files = json.loads(body)["files"]
        modes = {f["path"]: "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular" for f in files}
        return self._json(
            {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]}
        )

    def _batch(self, repo: str, body: bytes) -> Any:
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            actions = {} if oid in self.blobs else {"upload": {"href": f"{self.url}/blob/{oid}", "header": {}}}
            objects.append({"oid": oid, "size": size, "authenticated": True, **({"actions": actions} if actions else {})})
        return self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "wrong content"}, 400)
        self.blobs[oid] = body
        return self._json({})

    def _commit(self, repo: str, body: bytes) -> Any:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        changed = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                self.repos[repo].pop(value["path"])
            else:
                continue
            changed.append(value["path"])
        self.commits.append((header["summary"], sorted(changed)))
        return self._json({"commitOid": self._sha(repo), "commitUrl": f"{self.url}/{repo}/commit/{self._sha(repo)}"})

    def _sha(self, repo: str) -> str:
        return hashlib.sha1(f"{repo} {len(self.commits)}".encode()).hexdigest()

    def _info(self, repo: str, body: bytes) -> Any:
        if repo not in self.repos:
            return self._json({"error": "Repository not found"}, 404)
        siblings = [{"rfilename": path} for path in self.repos[repo]]
        return self._json({"_id": "1", "id": repo, "sha": self._sha(repo), "private": self.private[repo], "siblings": siblings})

    def _tree(self, repo: str, body: bytes) -> Any:
        return self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in self.repos[repo].items()
            ]
        )

    def _resolve(self, repo: str, file: str, body: bytes) -> Any:
        content = self.repos.get(repo, {}).get(file)
        if content is None:
            status, text, headers = self._json({"error": "Entry not found"}, 404)
            return status, text, {**headers, "X-Error-Code": "EntryNotFound"}
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self._sha(repo)}
        return 200, content, {**headers, "Content-Type": "application/octet-stream"}
