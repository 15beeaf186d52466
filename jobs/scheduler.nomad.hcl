# Agents that host no layers and place models for the cluster. The leader holds a session in Consul; when it is lost another
# one takes over, and meanwhile nothing stops but re-planning. Without this job the agents of node-agent.nomad.hcl do the same.
#
#   nomad job run -var scheduler=off jobs/node-agent.nomad.hcl
#   nomad job run jobs/scheduler.nomad.hcl
#
# Needs Nomad 1.1 and Consul.

variable "command" {
  default = "mesh"
}

variable "datacenters" {
  default = ["dc1"]
}

variable "data_dir" {
  description = "Models are read here: whoever plans must know a model's layers (`mesh model pull`)."
  default     = "/var/lib/inference-mesh"
}

variable "consul" {
  default = "http://127.0.0.1:8500"
}

job "mesh-scheduler" {
  type        = "service"
  datacenters = var.datacenters

  update {
    max_parallel     = 1
    health_check     = "checks"
    min_healthy_time = "10s"
    healthy_deadline = "3m"
    auto_revert      = true
  }

  group "scheduler" {
    # One leads, the other waits.
    count = 2

    constraint {
      operator = "distinct_hosts"
      value    = "true"
    }

    # Rather on machines that stay.
    affinity {
      attribute = "${node.class}"
      value     = "gateway"
      weight    = 50
    }

    network {
      port "grpc" {}
      port "api" {}
    }

    restart {
      attempts = 3
      interval = "2m"
      delay    = "2s"
      mode     = "fail"
    }

    reschedule {
      delay          = "5s"
      delay_function = "exponential"
      max_delay      = "5m"
      unlimited      = true
    }

    ephemeral_disk {
      size = 60
    }

    service {
      name = "mesh-scheduler"
      port = "grpc"
      check {
        type     = "grpc"
        port     = "grpc"
        interval = "10s"
        timeout  = "2s"
      }
    }

    task "scheduler" {
      driver = "raw_exec"
      config {
        command = var.command
        args    = ["agent"]
      }

      env {
        MESH_NAME       = "scheduler-${NOMAD_ALLOC_INDEX}-${node.unique.name}"
        MESH_HOST       = "${attr.unique.network.ip-address}"
        MESH_PORT       = "${NOMAD_PORT_grpc}"
        MESH_API_PORT   = "${NOMAD_PORT_api}"
        MESH_HOME       = var.data_dir
        MESH_DATA_DIR   = "${NOMAD_TASK_DIR}/agent"
        MESH_CONSUL     = var.consul
        MESH_SCHEDULER  = "on"
        # No room for a layer: it plans, and takes requests that somebody sends it.
        MESH_MEMORY     = 1
        MESH_LOG_FORMAT = "json"
      }

      resources {
        cpu    = 200
        memory = 256
      }

      logs {
        max_files     = 3
        max_file_size = 10
      }

      kill_signal  = "SIGTERM"
      kill_timeout = "15s"
    }
  }
}
