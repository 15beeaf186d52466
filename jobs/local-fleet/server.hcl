# The fleet's Nomad server. up.sh writes FOLDER in. Agents that are not in dev mode refuse loopback unless they advertise it.
name      = "server"
data_dir  = "FOLDER/nomad-server"
bind_addr = "127.0.0.1"

advertise {
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}

server {
  enabled          = true
  bootstrap_expect = 1

  # A client that was killed is lost after two seconds, not half a minute.
  heartbeat_grace   = "1s"
  min_heartbeat_ttl = "1s"
}

consul {
  address = "127.0.0.1:8500"
}
