# One agent on every client: it hosts shards, joins the mesh and serves the OpenAI API on the client's loopback.
#
#   nomad job run jobs/node-agent.nomad.hcl
#   nomad job run -var labels='tier=${meta.tier}' -var scheduler=off jobs/node-agent.nomad.hcl
#
# Needs Nomad 1.1 (1.0 for variables; memory_max is 1.1 and not used), and `mesh` on the clients' PATH.

variable "command" {
  description = "Where clients have mesh; an absolute path where it is not on Nomad's PATH."
  default     = "mesh"
}

variable "datacenters" {
  default = ["dc1"]
}

variable "host" {
  description = "Address that the agent listens on and tells peers. Several clients on one machine each have theirs in meta."
  default     = "$${attr.unique.network.ip-address}"
}

variable "api_host" {
  description = "Address of the OpenAI API: the client's loopback. Several clients on one machine each have theirs."
  default     = "127.0.0.1"
}

variable "data_dir" {
  description = "Identity, token log, hop log and models. Outside the allocation, so that an update of this job keeps them."
  default     = "/var/lib/inference-mesh"
}

variable "consul" {
  description = "The client's Consul agent. Empty: peers are found by multicast DNS."
  default     = "http://127.0.0.1:8500"
}

variable "scheduler" {
  description = "off where jobs/scheduler.nomad.hcl runs: agents that host layers then leave planning to it."
  default     = "on"
}

variable "labels" {
  description = "Labels for placement, key=value with commas between; as above, from meta that every client has."
  default     = ""
}

variable "shards_memory" {
  description = "MiB for shards and KV cache. 0: what is free. Leases reserve what they hold with Nomad themselves."
  default     = 0
}

job "mesh-agent" {
  # One for each client, new clients included. They are drained last, after the leases of models have moved.
  type        = "system"
  datacenters = var.datacenters

  # Clients that say meta { mesh = "off" } get none.
  constraint {
    attribute = "${meta.mesh}"
    operator  = "!="
    value     = "off"
  }

  # A new version goes from client to client. Canaries of system jobs are newer than Nomad 1.1.
  update {
    max_parallel = 1
    stagger      = "30s"
  }

  group "agent" {
    # The agents' ports. Membership sends datagrams to the number of the gRPC port: open it for UDP as well.
    network {
      port "grpc" {
        static = 7070
      }
      port "api" {
        static = 8080
      }
    }

    # An agent that dies is started again on the spot: it resumes its sessions from its disk. mode = "delay" never gives up.
    restart {
      attempts = 10
      interval = "5m"
      delay    = "1s"
      mode     = "delay"
    }

    # Logs only; it must exceed them.
    ephemeral_disk {
      size = 60
    }

    # Health for people and for Nomad. Peers do not read it: agents register themselves in Consul, with what they can do.
    service {
      name = "mesh-agent"
      port = "grpc"
      check {
        type     = "grpc"
        port     = "grpc"
        interval = "10s"
        timeout  = "2s"
      }
    }

    task "agent" {
      # raw_exec: the agent reads the board (NPU, battery, cgroup quota) and caps nothing that the shards need. With exec, set
      # memory_max to what the shards take (Nomad 1.1, oversubscription on); with docker, see the variant at the end.
      driver = "raw_exec"
      config {
        command = var.command
        args    = ["agent"]
      }

      # Every setting of `mesh agent --help` can stand here as MESH_NAME.
      env {
        MESH_NAME       = "${node.unique.name}"
        MESH_HOST       = var.host
        MESH_PORT       = "${NOMAD_PORT_grpc}"
        MESH_API_HOST   = var.api_host
        MESH_API_PORT   = "${NOMAD_PORT_api}"
        MESH_HOME       = var.data_dir
        MESH_DATA_DIR   = "${var.data_dir}/agent"
        MESH_CONSUL     = var.consul
        MESH_LABELS     = var.labels
        MESH_SCHEDULER  = var.scheduler
        MESH_MEMORY     = var.shards_memory
        MESH_LOG_FORMAT = "json"
      }

      # The agent's own overhead. Shards and KV cache are reserved by the leases that hold them (`mesh lease`).
      resources {
        cpu    = 200
        memory = 200
      }

      logs {
        max_files     = 3
        max_file_size = 10
      }

      # SIGTERM: the agent hands its sessions over, then leaves. The client allows this long (its max_kill_timeout is 30 s).
      kill_signal  = "SIGTERM"
      kill_timeout = "30s"
    }
  }
}

# With docker: driver = "docker", and for config
#   image        = "registry.example/inference-mesh:0.1.0"
#   network_mode = "host"
#   args         = ["agent"]
#   volumes      = ["/var/lib/inference-mesh:/var/lib/inference-mesh"]
#   memory_hard_limit = 4096    # MiB: agent, shards and KV cache together; without it docker caps at `memory`
