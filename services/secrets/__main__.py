"""Make the stack's secrets: `python -m services.secrets DIR`. What exists is kept; there are no defaults.

One folder per reader, so that a container mounts nothing it does not need:

    DIR/nginx        worker_token
    DIR/gateway      redis_password  worker_token  service_token  cache_secret  answer_secret
    DIR/worker       redis_password  worker_token  answer_secret  kv_secret
    DIR/jobs         redis_password  service_token  trainer_token
    DIR/trainer      redis_password  worker_token  trainer_token
    DIR/ledger       redis_password
    DIR/monitor      redis_password  redis_passwords.json  admin_password   (redis exporter, Grafana)
    DIR/redis        users.acl  cache.acl       (digests only)
"""

import argparse
import json
import os
import secrets
import sys
from hashlib import sha256
from pathlib import Path

ACL = """\
user default off resetpass ~* &* +@all
user health on nopass resetkeys resetchannels -@all +ping
user gateway on #{gateway} resetkeys ~key:* ~worker:* ~workers ~running:* ~usage ~flushed:* ~reaped:* %R~aliases \
~response:* ~responses:* ~responsesizes:* ~wake:* resetchannels &workers &keys &held &aliases -@all +ping +hello \
+multi +exec +discard +get +set +del +exists +mget +scan +smembers +srem +hset +hget +hmget +hdel +hexists +hgetall \
+hvals +xadd +xlen +xrange +zadd +zrem +zrange +zscore +hincrby +expire +time +publish +subscribe +unsubscribe +eval
user worker on #{worker} resetkeys ~worker:* ~workers ~running:* ~usage ~flushed:* %R~reaped:* %R~adapters \
~response:* ~responses:* ~responsesizes:* %R~wake:* ~place:* resetchannels &workers -@all +ping +hello +multi +exec \
+discard +get +set +del +exists +sadd +srem +hset +hget +hmget +hdel +hgetall +hvals +xadd +zadd +zrem +zrange +zscore \
+hincrby +expire +pexpire +time +publish +eval
user jobs on #{jobs} resetkeys %R~key:* %R~worker:* %R~workers %R~usage ~adapters ~aliases ~file:* ~files:* ~ftjob:* \
~ftjobs:* ~ftqueue ~fttaken ~ftlease:* ~ftevents:* ~ftcheckpoints:* ~bt:* ~bts:* ~btactive \
resetchannels &workers &keys &aliases -@all +ping +hello +multi +exec +discard +get +del +mget +scan +smembers \
+hget +hset +hgetall +hdel +lrange +xread +xrange +xrevrange +publish +subscribe +unsubscribe +eval
user ledger on #{ledger} resetkeys %R~key:* %R~worker:* %R~workers %R~usage %R~wake:* ~used:* ~ledger:* \
resetchannels &workers &keys -@all +ping +hello +get +del +mget +scan +exists +smembers +hgetall +hvals +xread \
+xinfo|stream +subscribe +unsubscribe
user monitor on #{monitor} resetkeys %R~* resetchannels -@all +ping +hello +info +config|get +slowlog|len +slowlog|get \
+latency|latest +latency|histogram +client|list +client|setname +select +scan +eval +evalsha +memory|usage
user trainer on #{trainer} resetkeys %R~worker:* %R~workers ~adapters ~place:* resetchannels -@all +ping +hello +mget \
+smembers +hget +hset +hgetall +hvals +hsetnx +hdel +pexpire +time +eval
"""
"""Each service may do what it does and nothing else; `health` may only PING. `default` is off, so nobody is ever that
user, but keeps its rights: redis 7.0 replays the AOF as `default`, and without them it drops every transaction and
script at the next start."""
SERVICES = ("gateway", "worker", "jobs", "trainer", "ledger", "monitor")
SHARED = {
    "worker_token": ("gateway", "nginx", "worker", "trainer"),
    "service_token": ("gateway", "jobs"),
    "answer_secret": ("gateway", "worker"),
    "trainer_token": ("jobs", "trainer"),
}
"""Secrets of several."""
CACHE_ACL = """\
user default off resetpass resetkeys resetchannels -@all
user health on nopass resetkeys resetchannels -@all +ping
user gateway on #{gateway} resetkeys ~answer:* resetchannels -@all +ping +hello +get +mget +set +del
user monitor on #{monitor} resetkeys %R~* resetchannels -@all +ping +hello +info +config|get +slowlog|len +slowlog|get \
+latency|latest +latency|histogram +client|list +client|setname +select +scan +eval +evalsha +memory|usage
user worker on #{worker} resetkeys ~kv:* ~kvseen:* %W~answer:* resetchannels -@all +ping +hello +strlen +getex \
+set +expire +info
"""
"""redis-cache: whoever meters writes answers, workers KV blocks. It has no AOF, so `default` needs no rights."""


def write(path: Path, text: str) -> None:
    """Write a file that only its owner and group can read, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.chmod(0o640)
    os.replace(partial, path)


def ensure(path: Path, secret: str | None = None) -> str:
    """The secret in a file, made on the first call."""
    if not path.exists():
        write(path, (secret or secrets.token_urlsafe(32)) + "\n")
    return path.read_text().strip()


def make(root: Path) -> None:
    """Make what is missing below `root`. Raises OSError."""
    passwords = {who: ensure(root / who / "redis_password") for who in SERVICES}
    for name, readers in SHARED.items():
        for who in readers:
            ensure(root / who / name, ensure(root / readers[0] / name))
    digests = {who: sha256(password.encode()).hexdigest() for who, password in passwords.items()}
    ensure(root / "gateway" / "cache_secret")
    ensure(root / "worker" / "kv_secret")
    ensure(root / "monitor" / "admin_password")
    addresses = ("redis://monitor@redis:6379", "redis://monitor@redis-cache:6379")
    known = json.dumps(dict.fromkeys(addresses, passwords["monitor"]))
    write(root / "monitor" / "redis_passwords.json", known + "\n")
    write(root / "redis" / "users.acl", ACL.format(**digests))
    write(root / "redis" / "cache.acl", CACHE_ACL.format(**digests))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m services.secrets", description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="where the secrets live")
    root = parser.parse_args().dir
    try:
        make(root)
    except OSError as error:
        sys.exit(f"secrets: cannot write {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
