"""A real S3 server (moto) on loopback, and helpers to inspect its buckets."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import requests
from moto.server import ThreadedMotoServer

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Environment for processes that use the server, besides `AWS_ENDPOINT_URL`."""
_numbers = itertools.count()


class Server:
    """One server; each test uses its own bucket."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        host, port = self.server.get_host_and_port()
        self.environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name=ENVIRONMENT["AWS_DEFAULT_REGION"],
            aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        )

    def bucket(self) -> "Bucket":
        bucket = Bucket(self.client, f"bucket-{next(_numbers)}")
        self.client.create_bucket(Bucket=bucket.name)
        return bucket

    @contextmanager
    def asking_who_it_is(self) -> Iterator[None]:
        """Deny all requests inside the context."""
        for allowed in ("0", "inf"):
            address = f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
            requests.post(address, data=allowed, timeout=5).raise_for_status()
            if allowed == "0":
                yield

    def close(self) -> None:
        self.server.stop()


class Bucket:
    """A bucket, inspected without agcl."""

    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name, self.uri = client, name, f"s3://{name}/some/prefix"

    def names(self) -> list[str]:
        """Keys of all objects below the storage's prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        found = [each["Key"] for page in pages for each in page.get("Contents", [])]
        assert all(key.startswith("some/prefix/") for key in found)
        return [key.removeprefix("some/prefix/") for key in found]

    def get(self, key: str) -> bytes:
        answer = self.client.get_object(Bucket=self.name, Key=f"some/prefix/{key}")
        return answer["Body"].read()  # type: ignore[no-any-return]

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"some/prefix/{key}", Body=content)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=f"some/prefix/{key}")
