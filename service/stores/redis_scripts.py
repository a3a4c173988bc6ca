"""What the Redis store does on the server: its keys, and one Lua script a call.

Rule: a script changes a session only where its token allows it, and done again it changes nothing more. Time is that
of the server, so that the clocks of replicas need not agree. `#!lua` has the server refuse a script as a whole, before
its first write, where it would refuse a write (read-only, full disk); so there is no half-done call.

Keys, all of a shard in one slot of a cluster:
    latch:{tag}:<id>          hash: the record, token, step, snapshot, expires_at (milliseconds of the server's clock)
    latch:{tag}-earlier:<id>  list: "step:snapshot" of the saves before the last one, oldest first
    latch:{tag}-ids           sorted set: the ids of the shard, in order
A session stays for `REMEMBERED` after it has expired, so that expired and never known can be told apart; one that was
ended by `EXPIRE` has an empty token and no state.
"""

from binascii import crc_hqx
from itertools import count

from xxhash import xxh3_64_intdigest

SHARDS = 16
FORMAT_KEY = "latch:format"
REMEMBERED = 3_600_000  # milliseconds

_SLOTS = 16_384
# The smallest numbers whose slots lie in the first, second, ... sixteenth part of all: shards spread evenly over nodes.
_TAGS = [
    next(tag for tag in map(str, count()) if crc_hqx(tag.encode(), 0) % _SLOTS * SHARDS // _SLOTS == shard)
    for shard in range(SHARDS)
]


def shard_of(session: str) -> int:
    """The same in every process and version."""
    return xxh3_64_intdigest(session.encode()) % SHARDS


def session_key(session: str) -> str:
    """Of the hash."""
    return f"latch:{{{_TAGS[shard_of(session)]}}}:{session}"


def earlier_key(session: str) -> str:
    """Of the list."""
    return f"latch:{{{_TAGS[shard_of(session)]}}}-earlier:{session}"


def ids_key(shard: int) -> str:
    """Of the sorted set."""
    return f"latch:{{{_TAGS[shard]}}}-ids"


_SHARED = f"""
local remembered = {REMEMBERED}
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function earlier_of(session) return (session:gsub('}}:', '}}-earlier:', 1)) end
local function session_of(ids, id) return ids:sub(1, -5) .. ':' .. id end
"""


def _script(body: str, flags: str = "") -> str:
    """A script that may use `now`, `remembered` and the names of the other keys."""
    return f"#!lua{f' flags={flags}' if flags else ''}\n{_SHARED}{body}"


# What a session is, in the order in which LOAD and PAGE give it.
RECORD = ("model", "version", "idle_ttl", "created_at", "metadata", "token", "step")
_FIELDS = ", ".join(f"'{name}'" for name in (*RECORD, "expires_at"))
_PLACE = len(RECORD) + 1

# KEYS: the format. ARGV: ours. Gives the one that is there.
FORMAT = _script("""
local found = redis.call('GET', KEYS[1])
if not found then redis.call('SET', KEYS[1], ARGV[1]) end
return found or ARGV[1]
""")

# It does nothing, where a script that writes may run.
PING = _script("return 1")

# KEYS: session, ids. ARGV: id, idle_ttl, token, then fields and values. Gives 0 where the id is taken.
CREATE = _script("""
local key, at = KEYS[1], now()
local found = redis.call('HMGET', key, 'token', 'expires_at')
if found[1] and found[1] ~= ARGV[3] and tonumber(found[2]) > at then return 0 end
local expires_at = at + math.ceil(ARGV[2] * 1000)
redis.call('DEL', key, earlier_of(key))
redis.call('HSET', key, 'idle_ttl', ARGV[2], 'token', ARGV[3], 'expires_at', expires_at, unpack(ARGV, 4))
redis.call('PEXPIREAT', key, expires_at + remembered)
redis.call('ZADD', KEYS[2], 0, ARGV[1])
return 1
""")

# KEYS: sessions. ARGV: for each, packed as `redis.ROW`: expected token, token, step, earlier (-1: keep), snapshot; at
# last how many earlier ones are kept. Gives a '1' or '0' for each. A save that is there is written again: WAIT confirms
# only what the same connection wrote.
SAVE = _script("""
local at, keep, done = now(), tonumber(ARGV[#ARGV]), {}
for i, key in ipairs(KEYS) do
  local expected, token, step, left, start = struct.unpack('<c16c16I8i4', ARGV[i])
  local found = redis.call('HMGET', key, 'token', 'idle_ttl')
  if found[1] ~= expected and found[1] ~= token then
    done[i] = '0'
  else
    local expires_at = at + math.ceil(found[2] * 1000)
    if left >= 0 or keep > 0 then
      local earlier = earlier_of(key)
      if left > 0 then
        redis.call('LTRIM', earlier, 0, left - 1)
      elseif left == 0 then
        redis.call('DEL', earlier)
      elseif found[1] == expected then
        local before = redis.call('HMGET', key, 'step', 'snapshot')
        redis.call('RPUSH', earlier, before[1] .. ':' .. before[2])
        redis.call('LTRIM', earlier, -keep, -1)
      end
      redis.call('PEXPIREAT', earlier, expires_at + remembered)
    end
    redis.call('HSET', key, 'token', token, 'step', step, 'snapshot', ARGV[i]:sub(start), 'expires_at', expires_at)
    redis.call('PEXPIREAT', key, expires_at + remembered)
    done[i] = '1'
  end
end
return table.concat(done)
""")

# KEYS: session. Gives nothing, or the milliseconds left, RECORD and the snapshot.
LOAD = _script(
    f"""
local found = redis.call('HMGET', KEYS[1], {_FIELDS}, 'snapshot')
if not found[{_PLACE}] then return false end
found[{_PLACE}] = tonumber(found[{_PLACE}]) - now()
return found
""",
    "no-writes",
)

# KEYS: the earlier saves.
EARLIER = _script("return redis.call('LRANGE', KEYS[1], 0, -1)", "no-writes")

# KEYS: session, ids. ARGV: id.
DELETE = _script(
    """
redis.call('DEL', KEYS[1], earlier_of(KEYS[1]))
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
""",
    "allow-oom",
)

# KEYS: sessions. ARGV: their tokens. Gives how many were ended.
EXPIRE = _script(
    """
local at, count = now(), 0
for i, key in ipairs(KEYS) do
  if redis.call('HGET', key, 'token') == ARGV[i] then
    redis.call('HDEL', key, 'snapshot', 'metadata')
    redis.call('DEL', earlier_of(key))
    redis.call('HSET', key, 'token', '', 'expires_at', at)
    redis.call('PEXPIREAT', key, at + remembered)
    count = count + 1
  end
end
return count
""",
    "allow-oom",
)

# KEYS: ids. ARGV: after which id, how many to look at, how many to give, of which model ('' of all). Gives the last id
# that it looked at, '' at the end; then id, RECORD and milliseconds left of each live session.
PAGE = _script(
    f"""
local at, rows, wanted = now(), {{}}, tonumber(ARGV[3])
local first = ARGV[1] == '' and '-' or '(' .. ARGV[1]
local ids = redis.call('ZRANGE', KEYS[1], first, '+', 'BYLEX', 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  local found = redis.call('HMGET', session_of(KEYS[1], id), {_FIELDS})
  local left = (tonumber(found[{_PLACE}]) or 0) - at
  if left > 0 and (ARGV[4] == '' or ARGV[4] == found[1]) then
    found[{_PLACE}] = left
    table.insert(found, 1, id)
    rows[#rows + 1] = found
    if #rows == wanted then break end
  end
end
return {{#ids < tonumber(ARGV[2]) and '' or ids[#ids], rows}}
""",
    "no-writes",
)

# KEYS: ids. ARGV: after which id, how many to look at. Drops the ids of sessions that are gone, and gives the last one
# that it looked at, '' at the end.
TRIM = _script(
    """
local first = ARGV[1] == '' and '-' or '(' .. ARGV[1]
local ids = redis.call('ZRANGE', KEYS[1], first, '+', 'BYLEX', 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  if (redis.call('HGET', session_of(KEYS[1], id), 'token') or '') == '' then redis.call('ZREM', KEYS[1], id) end
end
return #ids < tonumber(ARGV[2]) and '' or ids[#ids]
""",
    "allow-oom",
)
