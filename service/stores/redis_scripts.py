"""What the Redis store does on the server: its keys, and one Lua script a call.

Rule: a script changes a session only where its token allows it, and done again it changes nothing more. `#!lua` has
the server refuse a script as a whole, before its first write, where it would refuse a write (read-only, full disk); so
there is no half-done call.

Keys, all of a shard in one slot of a cluster:
    latch:{tag}:<id>          hash: the record, `lifetime`, `head` (the token and, in 8 bytes, the step), `snapshot`
    latch:{tag}-earlier:<id>  list: the saves before the last one, oldest first; the step in 8 bytes, the snapshot
    latch:{tag}-ids           sorted set: the ids of the shard, in order
A session has the server's own expiry, so that the clocks of replicas need not agree: `lifetime` milliseconds after its
last save, which is `REMEMBERED` after it idled out. Meanwhile expired and never known can be told apart. One that was
ended by `EXPIRE` has an empty head and no snapshot.
"""

from binascii import crc_hqx
from itertools import count

from xxhash import xxh3_64_intdigest

SHARDS = 16
FORMAT_KEY = "latch:format"
REMEMBERED = 3_600_000  # milliseconds after it idled out
_UNHEARD = 60_000  # of them, in which somebody may still tell that a session was used before

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
local call, remembered = redis.call, {REMEMBERED}
local function left_of(session) return call('PTTL', session) - remembered end
local function earlier_of(session) return (session:gsub('}}:', '}}-earlier:', 1)) end
local function session_of(ids, id) return ids:sub(1, -5) .. ':' .. id end
local function fields_of(key, ...)
  local found = redis.pcall('HMGET', key, ...)
  return found.err and {{}} or found
end
local function end_session(key)
  call('HDEL', key, 'snapshot', 'metadata')
  call('DEL', earlier_of(key))
  call('HSET', key, 'head', '')
end
"""


def _script(body: str, flags: str = "") -> str:
    """A script that may use what is shared."""
    return f"#!lua{f' flags={flags}' if flags else ''}\n{_SHARED}{body}"


# What a session is, in the order in which LOAD and PAGE give it.
RECORD = ("model", "version", "idle_ttl", "created_at", "metadata", "head")
_RECORD = ", ".join(f"'{name}'" for name in RECORD)
_NOTHING = ", ".join(["''"] * len(RECORD))

# KEYS: the format. ARGV: ours. Gives the one that is there.
FORMAT = _script("""
local found = call('GET', KEYS[1])
if not found then call('SET', KEYS[1], ARGV[1]) end
return found or ARGV[1]
""")

# It does nothing, where a script that writes may run.
PING = _script("return 1")

# KEYS: session, ids. ARGV: id, lifetime, token, then fields and values. Gives 0 where the id is taken.
CREATE = _script("""
local key = KEYS[1]
local head = redis.pcall('HGET', key, 'head')
if type(head) == 'table' then return 0 end
if head and head:sub(1, 16) ~= ARGV[3] and left_of(key) > 0 then return 0 end
call('DEL', key, earlier_of(key))
call('HSET', key, 'lifetime', ARGV[2], unpack(ARGV, 4))
call('PEXPIRE', key, ARGV[2])
call('ZADD', KEYS[2], 0, ARGV[1])
return 1
""")

# KEYS: sessions. ARGV: how many earlier ones are kept; for each session, as `redis` packs them, the expected token, how
# many earlier ones are left (-1: what is replaced is put with them), head, the snapshot's length and the snapshot.
# Gives a '1' or '0' for each. A save that is there is written again: WAIT confirms only what one connection wrote.
SAVE = _script("""
local keep, rows, at, done = tonumber(ARGV[1]), ARGV[2], 1, {}
for i, key in ipairs(KEYS) do
  local expected, left, head, snapshot
  expected, left, head, snapshot, at = struct.unpack('<c16i4c24I4c0', rows, at)
  local found = fields_of(key, 'head', 'lifetime')
  local token = found[1] and found[1]:sub(1, 16)
  if token ~= expected and token ~= head:sub(1, 16) then
    done[i] = '0'
  else
    if left >= 0 or keep > 0 then
      local earlier = earlier_of(key)
      if left > 0 then
        call('LTRIM', earlier, -keep, -1)
        call('LTRIM', earlier, 0, left - 1)
      elseif left == 0 then
        call('DEL', earlier)
      elseif token == expected then
        call('RPUSH', earlier, found[1]:sub(17) .. call('HGET', key, 'snapshot'))
        call('LTRIM', earlier, -keep, -1)
      end
      call('PEXPIRE', earlier, found[2])
    end
    call('HSET', key, 'head', head, 'snapshot', snapshot)
    call('PEXPIRE', key, found[2])
    done[i] = '1'
  end
end
return table.concat(done)
""")

# KEYS: session. Gives nothing, or RECORD, the milliseconds left and the snapshot; of a key that is no hash, empty text.
LOAD = _script(
    f"""
local found = redis.pcall('HMGET', KEYS[1], {_RECORD})
if found.err then return {{{_NOTHING}, 1, ''}} end
if not found[{len(RECORD)}] then return false end
found[{len(RECORD) + 1}] = left_of(KEYS[1])
found[{len(RECORD) + 2}] = call('HGET', KEYS[1], 'snapshot')
return found
""",
    "no-writes",
)

# KEYS: the earlier saves. ARGV: how many.
EARLIER = _script("return call('LRANGE', KEYS[1], -ARGV[1], -1)", "no-writes")

# KEYS: session, ids. ARGV: id, and when the session was made, '' at any time. A call may come after its second try was
# answered and another session was made.
DELETE = _script(
    """
local made = ARGV[2] ~= '' and fields_of(KEYS[1], 'created_at')[1]
if made and made ~= ARGV[2] then return 0 end
call('DEL', KEYS[1], earlier_of(KEYS[1]))
call('ZREM', KEYS[2], ARGV[1])
return 1
""",
    "allow-oom",
)

# KEYS: sessions. ARGV: their tokens. Gives how many were ended.
EXPIRE = _script(
    """
local count = 0
for i, key in ipairs(KEYS) do
  local head = fields_of(key, 'head')[1]
  if head and head:sub(1, 16) == ARGV[i] then
    end_session(key)
    call('PEXPIRE', key, remembered)
    count = count + 1
  end
end
return count
""",
    "allow-oom",
)

# KEYS: sessions. ARGV: their tokens.
TOUCH = _script(
    """
for i, key in ipairs(KEYS) do
  local found = fields_of(key, 'head', 'lifetime')
  if found[1] and found[1]:sub(1, 16) == ARGV[i] then
    call('PEXPIRE', key, found[2])
    call('PEXPIRE', earlier_of(key), found[2])
  end
end
return 1
""",
    "allow-oom",
)

# KEYS: ids. ARGV: after which id, how many to look at, how many to give, of which model ('' of all). Gives the last id
# that it looked at, '' at the end; then id, RECORD and milliseconds left of each live session.
PAGE = _script(
    f"""
local rows, wanted = {{}}, tonumber(ARGV[3])
local first = ARGV[1] == '' and '-' or '(' .. ARGV[1]
local ids = call('ZRANGE', KEYS[1], first, '+', 'BYLEX', 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  local key = session_of(KEYS[1], id)
  local left = left_of(key)
  local found = left > 0 and redis.pcall('HMGET', key, {_RECORD})
  if found and not found.err and (ARGV[4] == '' or ARGV[4] == found[1]) then
    found[{len(RECORD) + 1}] = left
    table.insert(found, 1, id)
    rows[#rows + 1] = found
    if #rows == wanted then break end
  end
end
return {{#ids < tonumber(ARGV[2]) and '' or ids[#ids], rows}}
""",
    "no-writes",
)

# KEYS: ids. ARGV: after which id, how many to look at. Drops ids of sessions that are gone, ends those that idled out
# a minute ago, and that no service may have had, and gives the last id that it looked at, '' at the end.
TRIM = _script(
    f"""
local first = ARGV[1] == '' and '-' or '(' .. ARGV[1]
local ids = call('ZRANGE', KEYS[1], first, '+', 'BYLEX', 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  local key = session_of(KEYS[1], id)
  local head = fields_of(key, 'head')[1] or ''
  local is_over = left_of(key) <= -{_UNHEARD}
  if #head > 0 and is_over then end_session(key) end
  if #head == 0 or is_over then call('ZREM', KEYS[1], id) end
end
return #ids < tonumber(ARGV[2]) and '' or ids[#ids]
""",
    "allow-oom",
)
