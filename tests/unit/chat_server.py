"""A local server that speaks the chat-completions protocol, for tests of everything that asks an endpoint."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serve(answer, statuses=()):
    """Base address of a server and the requests it got.

    Args:
        answer: Function of the request body, gives the text of the reply (or a dict: the whole reply).
        statuses: HTTP statuses of the first requests; afterwards 200.
    """
    requests = []
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
            status = left.pop(0) if left else 200
            said = answer(body)
            reply = (
                said if isinstance(said, dict) else {"choices": [{"message": {"content": said}}]}
            )
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
