#!/usr/bin/env python3
"""A user of a bootcache controller in another language (docs/protocol.md). Needs msgpack (Debian: python3-msgpack).

usage: mfd_client.py HOST:PORT|SOCKET nodes | deploy PLAN.json | end TASK"""
import json, socket, struct, sys, time, uuid
import msgpack

REPLY, DEPLOY, END, QUERY = 0x00, 0x03, 0x04, 0x07


class Controller:
    def __init__(self, target):
        if "/" in target:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(target)
        else:
            host, port = target.rsplit(":", 1)
            self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.stream = self.socket.makefile("rb")
        self.id = 0

    def read(self, length):
        data = self.stream.read(length)
        if len(data) < length:
            raise SystemExit("the controller closed the connection")
        return data

    def call(self, kind, body):
        self.id += 1
        payload = msgpack.packb({"id": self.id, "version": 1, "body": body})
        self.socket.sendall(b"MFD" + struct.pack(">BI", kind, len(payload)) + payload)
        magic, kind, length = struct.unpack(">3sBI", self.read(8))
        reply = msgpack.unpackb(self.read(length), strict_map_key=False)
        if reply.get("error"):
            raise SystemExit(f"{reply['error']['code']}: {reply['error']['message']}")
        assert (magic, kind, reply["id"]) == (b"MFD", REPLY, self.id)
        return reply["ok"]


def main(target, command, *arguments):
    controller = Controller(target)
    if command == "nodes":
        after = None
        while rows := controller.call(QUERY, {"nodes": {"after": after}})["nodes"]:
            for node in rows:
                print(node["name"], "online" if node["online"] else "offline", node["address"])
            after = rows[-1]["name"]
    elif command == "deploy":
        with open(arguments[0]) as plan:
            task = controller.call(DEPLOY, {"request": str(uuid.uuid4()), "plan": json.load(plan)})["task"]
        while (row := controller.call(QUERY, {"tasks": {"task": task}})["tasks"][0])["status"] == "starting":
            time.sleep(0.2)
        print("task", task, row["status"], row["instances"])
    elif command == "end":
        controller.call(END, {"task": int(arguments[0])})
        print("task", arguments[0], "is being ended")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
