"""A local stand-in of a model hub's API: repositories in memory, with the requests of ``huggingface_hub``."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

__all__ = ["Hub"]


class Hub:
    """The server; ``repos`` has the files of each repository by name.

    Attributes:
        repos: Content of files by repository and name.
        private: Whether each repository was created as a private one.
        requests: Method and path of every request.
        address: Address of the server.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(data).encode())

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            raw = b""
            while size := int(self.rfile.readline(), 16):
                raw += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append(f"POST {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            data = json.loads(raw)
            name = "/".join(filter(None, [data.get("organization"), data["name"]]))
            self.hub.repos.setdefault(name, {})
            self.hub.private[name] = bool(data.get("private") or data.get("visibility") == "private")
            return self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        if parts[:2] == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        name, action = "/".join(parts[2:4]), parts[4]
        if name not in self.hub.repos:
            return self._answer(404, b"{}", X_Error_Code="RepoNotFound")
        if action == "preupload":
            files = json.loads(raw)["files"]
            plain = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._json({"files": plain})
        if action == "commit":
            for line in raw.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = "c" * 40
            return self._json(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.address}/{name}/commit/{commit}"}
            )
        return self._answer(404, b"{}")

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.hub.repos:
                return self._answer(404, b"{}", X_Error_Code="RepoNotFound")
            files = self.hub.repos[name]
            if "tree" in parts:
                return self._json(
                    [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in sorted(files.items())]
                )
            siblings = [{"rfilename": file} for file in sorted(files)]
            return self._json(
                {"id": name, "modelId": name, "sha": "c" * 40, "siblings": siblings, "private": True, "tags": []}
            )
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.hub.repos.get(name, {}).get(file)
        if content is None:
            return self._answer(404, b"{}", X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._answer(200, content, ETag=etag, X_Repo_Commit="c" * 40, Accept_Ranges="bytes")

    do_HEAD = do_GET
