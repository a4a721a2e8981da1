"""Every Lua script of the system: what must happen at once or not at all.

Above each one: its KEYS, its ARGV, what it returns, and why it is a script.
"""

# KEYS[1] worker:{id}  KEYS[2] running:{id}  KEYS[3] workers  KEYS[4] usage  KEYS[5] reaped:{id} ; ARGV[1] id,
# ARGV[2] max entries, ARGV[3] seconds to remember it. Returns how many requests were lost; -1 for a worker that lives.
REAP = """
if redis.call('EXISTS', KEYS[1]) == 1 then return -1 end
local left = redis.call('HVALS', KEYS[2])
for _, record in ipairs(left) do
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[2], '*', 'r', record)
end
if #left > 0 then redis.call('SET', KEYS[5], '1', 'EX', ARGV[3]) end
redis.call('DEL', KEYS[2])
redis.call('SREM', KEYS[3], ARGV[1])
return #left
"""

# KEYS[1] usage  KEYS[2] flushed:{recorder} ; ARGV[1] seconds to remember the flush, ARGV[2] max entries, ARGV[3] number
# of the flush, ARGV[4] how many begun; then for each begun request: running:{worker}, record id, record; then for each
# ended one: the same three and '1' if an earlier flush has shown it as begun, else ''. Returns 1; 0 for a repetition.
# A flush is applied once, however often it is sent: a timeout does not tell whether redis ran it. A request that was
# shown and is gone from running:{worker} was ended by REAP, if that has been there (reaped:{worker}); it has its entry.
# Else redis has lost it with its last second.
FLUSH = """
if tonumber(redis.call('GET', KEYS[2]) or '0') >= tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[1])
local ended_from = 5 + 3 * tonumber(ARGV[4])
for i = 5, ended_from - 1, 3 do redis.call('HSET', ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
for i = ended_from, #ARGV, 4 do
  local ours = redis.call('HDEL', ARGV[i], ARGV[i + 1]) == 1 or ARGV[i + 3] == ''
  if ours or redis.call('EXISTS', 'reaped' .. string.sub(ARGV[i], 8)) == 0 then
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'r', ARGV[i + 2])
  end
end
return 1
"""

# KEYS[1] aliases ; ARGV name, owner, model ('': the previous one), now in s, channel.
# Returns the alias as JSON, 'taken' for another key's, 'none' without a previous one. Switched and told at once.
SWITCH = """
local raw = redis.call('HGET', KEYS[1], ARGV[1])
local alias = raw and cjson.decode(raw) or {name = ARGV[1], owner = ARGV[2], model = '', previous = ''}
if alias.owner ~= ARGV[2] then return 'taken' end
local model = ARGV[3]
if model == '' then model = alias.previous end
if model == '' then return 'none' end
if model ~= alias.model then
    alias.previous, alias.model, alias.changed_at = alias.model, model, tonumber(ARGV[4])
end
local text = cjson.encode(alias)
redis.call('HSET', KEYS[1], ARGV[1], text)
redis.call('PUBLISH', ARGV[5], text)
return text
"""

# KEYS[1] response:{key}:{id}  KEYS[2] responses:{key}  KEYS[3] responsesizes:{key} ; ARGV[1] id, ARGV[2] previous,
# ARGV[3] items, ARGV[4] response, ARGV[5] bytes, ARGV[6] seconds to keep it unused, ARGV[7] bytes for all of this key,
# ARGV[8] response:{key}: . Returns 1; 0 when it cannot be kept so that it can be continued: what it continues is gone,
# or would have to go to make room. Nothing is written before that is known, and the first write is one that a full
# redis refuses.
SAVE_RESPONSE = """
local time, ttl = redis.call('TIME'), tonumber(ARGV[6])
local now, past, id = time[1] + time[2] / 1000000, {[ARGV[1]] = true}, ARGV[2]
while id ~= '' do
  past[id] = true
  id = redis.call('HGET', ARGV[8] .. id, 'previous')
  if not id then return 0 end
end
local total = tonumber(redis.call('HGET', KEYS[3], 'total') or '0')
local out, freed, at = {}, tonumber(redis.call('HGET', KEYS[3], ARGV[1]) or '0'), 0
while true do
  local old = redis.call('ZRANGE', KEYS[2], at, at, 'WITHSCORES')
  local over = total + ARGV[5] - freed > tonumber(ARGV[7])
  if not old[1] and over then return 0 end
  if not old[1] or (not over and tonumber(old[2]) > now - ttl) then break end
  if not past[old[1]] then
    freed, out[#out + 1] = freed + tonumber(redis.call('HGET', KEYS[3], old[1]) or '0'), old[1]
  end
  at = at + 1
end
redis.call('HSET', KEYS[1], 'response', ARGV[4], 'items', ARGV[3], 'previous', ARGV[2])
redis.call('EXPIRE', KEYS[1], ttl)
for _, old in ipairs(out) do
  redis.call('DEL', ARGV[8] .. old)
  redis.call('ZREM', KEYS[2], old)
  redis.call('HDEL', KEYS[3], old)
end
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[5], 'total', total + ARGV[5] - freed)
redis.call('EXPIRE', KEYS[2], ttl)
redis.call('EXPIRE', KEYS[3], ttl)
return 1
"""

# KEYS[1] responses:{key}  KEYS[2] responsesizes:{key} ; ARGV[1] id, ARGV[2] seconds to keep what is used (0: it is only
# looked at), ARGV[3] most turns, ARGV[4] most bytes, ARGV[5] response:{key}: . Returns items and response of the
# response and of each one it continues, newest first; and at its end, if it is not all, the id of one that is not
# there, or '' when there are more turns or bytes. A script, because each one names the next. What was used lately is
# not written down again; a redis that is full, or cannot write, is still read.
CHAIN = """
local said, id, time, keep = {}, ARGV[1], redis.call('TIME'), tonumber(ARGV[2])
local now, bytes = time[1] + time[2] / 1000000, 0
local stale = now - keep / 1000
while id ~= '' do
  local key = ARGV[5] .. id
  local link = redis.call('HMGET', key, 'items', 'response', 'previous')
  if not link[2] then
    said[#said + 1] = id
    return said
  end
  bytes = bytes + #link[1] + #link[2]
  if #said >= 2 * ARGV[3] or bytes > tonumber(ARGV[4]) then
    said[#said + 1] = ''
    return said
  end
  said[#said + 1] = link[1]
  said[#said + 1] = link[2]
  if keep > 0 and tonumber(redis.call('ZSCORE', KEYS[1], id) or '0') < stale then
    redis.pcall('EXPIRE', key, keep)
    redis.pcall('ZADD', KEYS[1], 'XX', now, id)
  end
  id = link[3]
end
if keep > 0 then
  redis.pcall('EXPIRE', KEYS[1], keep)
  redis.pcall('EXPIRE', KEYS[2], keep)
end
return said
"""

# KEYS[1] response:{key}:{id}  KEYS[2] responses:{key}  KEYS[3] responsesizes:{key} ; ARGV[1] id. Returns whether it was
# there.
DROP_RESPONSE = """
local bytes = redis.call('HGET', KEYS[3], ARGV[1])
if bytes then
  redis.call('HDEL', KEYS[3], ARGV[1])
  redis.call('HINCRBY', KEYS[3], 'total', -bytes)
end
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
"""

# KEYS[1] responses:{key}  KEYS[2] responsesizes:{key} ; ARGV[1] response:{key}: . All of a key's responses go.
FORGET_RESPONSES = """
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('DEL', ARGV[1] .. id) end
redis.call('DEL', KEYS[1], KEYS[2])
"""

# KEYS[1] place:{place} ; ARGV[1] member, ARGV[2] kind (turn, always, all), ARGV[3] '1' wants to be awake, ARGV[4] how
# it is (asleep, waking, awake), ARGV[5] '1' has requests, ARGV[6] ms since it was used, ARGV[7] members of kind turn
# that are awake at once, ARGV[8] ms that it stays awake at least, ARGV[9] ms after which a silent one is forgotten,
# ARGV[10] ms in which a place that nobody was heard of is given to nobody: those who are awake speak first.
# Returns {1: it may be awake, 1: it is asked to sleep, how many are before it, 1: somebody has or wants all}.
# Who may be awake is decided in one step, so that no two engines ever start on one card. `all` (a training) wants
# everybody else asleep; while it waits or works nobody else wakes. Else whoever wants its turn first gets it: when no
# place is free, the member that was used longest ago is asked, an idle one before a busy one, none before its time.
TURN = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local me, kind, members = ARGV[1], ARGV[2], {}
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  local member = cjson.decode(flat[i + 1])
  if member.seen + tonumber(ARGV[9]) < now then redis.call('HDEL', KEYS[1], flat[i]) else members[flat[i]] = member end
end
if #flat == 0 then members['*'] = {kind = 'new', holds = false, since = now, wants = 0, asked = false, seen = now}
  redis.call('HSET', KEYS[1], '*', cjson.encode(members['*'])) end
local new = members['*'] and now - members['*'].seen < tonumber(ARGV[10])
local mine = members[me] or {holds = false, since = now, wants = 0, asked = false}
members[me] = mine
mine.kind, mine.seen, mine.busy, mine.used = kind, now, ARGV[5] == '1', now - tonumber(ARGV[6])
if ARGV[3] ~= '1' then mine.holds, mine.wants, mine.asked = false, 0, false
elseif ARGV[4] ~= 'asleep' and not mine.holds then mine.holds, mine.since, mine.wants = true, now, 0
elseif not mine.holds and mine.wants == 0 then mine.wants = now end
if ARGV[4] ~= 'awake' then mine.since = now end
local names = {}
for name in pairs(members) do names[#names + 1] = name end
table.sort(names)
local holders, ahead, everybody, needed = {}, 0, 0, false
for _, name in ipairs(names) do
  local member = members[name]
  if name ~= me then
    if member.kind == 'all' and (member.holds or member.wants > 0) then everybody = 1 end
    if not member.holds and member.wants > 0 and member.kind == 'turn' and kind == 'turn' then needed = true end
    if member.holds and (kind == 'all' or member.kind == 'turn') then holders[#holders + 1] = name end
    if not member.holds and member.wants > 0 and member.kind == kind
      and (member.wants < mine.wants or (member.wants == mine.wants and name < me)) then ahead = ahead + 1 end
  end
end
local places = kind == 'all' and 1 or tonumber(ARGV[7])
if kind == 'always' then holders = {} end
local surplus = kind == 'turn' and mine.holds and #holders + 1 > places
if surplus then
  local older = 0
  for _, name in ipairs(holders) do
    local other = members[name]
    if other.since < mine.since or (other.since == mine.since and name < me) then older = older + 1 end
  end
  surplus = older >= places
  mine.asked = mine.asked or surplus
end
if mine.wants > 0 and not new and (kind == 'all' or everybody == 0) then
  local missing = kind == 'all' and #holders or #holders + ahead + 1 - places
  if missing <= 0 and (kind ~= 'all' or ahead == 0) then mine.holds, mine.since, mine.wants = true, now, 0
  else
    local able = {}
    for _, name in ipairs(holders) do
      local member = members[name]
      local its_time = kind == 'all' or now - member.since >= tonumber(ARGV[8])
      if member.asked then missing = missing - 1
      elseif its_time and member.kind ~= 'all' then able[#able + 1] = name end
    end
    table.sort(able, function(a, b)
      local one, other = members[a], members[b]
      if one.busy ~= other.busy then return other.busy end
      if one.used ~= other.used then return one.used < other.used end
      return a < b
    end)
    for i = 1, math.min(missing, #able) do
      members[able[i]].asked = true
      redis.call('HSET', KEYS[1], able[i], cjson.encode(members[able[i]]))
    end
  end
end
if everybody == 1 and mine.holds and kind ~= 'all' then mine.asked = true end
if everybody == 0 and not needed and not surplus then mine.asked = false end
redis.call('HSET', KEYS[1], me, cjson.encode(mine))
redis.call('PEXPIRE', KEYS[1], ARGV[9])
return {mine.holds and 1 or 0, mine.asked and 1 or 0, ahead, everybody}
"""
