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
# ARGV[8] response:{key}: . Returns how many others made room. The first write comes before any other: a full redis
# refuses it, and nothing has changed then.
SAVE_RESPONSE = """
redis.call('HSET', KEYS[1], 'response', ARGV[4], 'items', ARGV[3], 'previous', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[6])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[5])
local out = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[6])
for _, id in ipairs(out) do redis.call('HDEL', KEYS[3], id) end
local total, dropped = 0, #out
for _, bytes in ipairs(redis.call('HVALS', KEYS[3])) do total = total + bytes end
if total > tonumber(ARGV[7]) then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    if total <= tonumber(ARGV[7]) then break end
    local bytes = redis.call('HGET', KEYS[3], id)
    if id ~= ARGV[1] and bytes then
      total = total - bytes
      out[#out + 1] = id
      redis.call('HDEL', KEYS[3], id)
    end
  end
end
for _, id in ipairs(out) do
  redis.call('DEL', ARGV[8] .. id)
  redis.call('ZREM', KEYS[2], id)
end
redis.call('EXPIRE', KEYS[2], ARGV[6])
redis.call('EXPIRE', KEYS[3], ARGV[6])
return #out - dropped
"""

# KEYS[1] responses:{key}  KEYS[2] responsesizes:{key} ; ARGV[1] id, ARGV[2] seconds to keep what is used (0: it
# is only looked at), ARGV[3] most turns, ARGV[4] response:{key}: .
# Returns items and response of the response and of each one it continues, newest first; and at its end the id of one
# that is not there. One turn more than ARGV[3] says that there are more. A script, because each one names the next.
CHAIN = """
local said, id, time, keep = {}, ARGV[1], redis.call('TIME'), ARGV[2] ~= '0'
local now = time[1] + time[2] / 1000000
if keep then
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
end
while id ~= '' and #said <= 2 * ARGV[3] do
  local key = ARGV[4] .. id
  local link = redis.call('HMGET', key, 'items', 'response', 'previous')
  if not link[2] then
    said[#said + 1] = id
    return said
  end
  said[#said + 1] = link[1]
  said[#said + 1] = link[2]
  if keep then
    redis.call('EXPIRE', key, ARGV[2])
    redis.pcall('ZADD', KEYS[1], 'XX', now, id)  -- a full redis refuses it
  end
  id = link[3]
end
return said
"""

# KEYS[1] response:{key}:{id}  KEYS[2] responses:{key}  KEYS[3] responsesizes:{key} ; ARGV[1] id. Returns whether it was
# there.
DROP_RESPONSE = """
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
return redis.call('DEL', KEYS[1])
"""
