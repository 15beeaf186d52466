# One of the fleet's Nomad clients. up.sh writes NAME, CLASS, HOST, FOLDER and PORTS in. Each has an address of its own, and a Consul
# agent of its own there: a Nomad client tidies its agent's services up, those of other clients as well.
name      = "NAME"
data_dir  = "FOLDER/nomad-NAME"
bind_addr = "HOST"

advertise {
  http = "HOST"
  rpc  = "HOST"
  serf = "HOST"
}

client {
  enabled           = true
  servers           = ["127.0.0.1:4647"]
  node_class        = "CLASS"
  network_interface = "lo"

  # What jobs know of the client. All have the address 127.0.0.1 in Nomad's eyes, so agents take theirs from here.
  meta {
    tier      = "CLASS"
    mesh_host = "HOST"
  }

  # Clients of one machine draw ports from the same address: each keeps to a range of its own.
  reserved {
    cpu            = 0
    memory         = 0
    reserved_ports = "PORTS"
  }

  # As long as an agent may take to hand its sessions over.
  max_kill_timeout = "60s"
}

plugin "raw_exec" {
  config {
    enabled = true
  }
}

consul {
  address = "HOST:8500"
}
