# One common endpoint for applications, where "any agent's loopback" does not do: agents that host no layers and serve the
# OpenAI API on the network. They are in Consul as mesh-api, for a load balancer or for `mesh ask --api A,B`. A stream that
# breaks off with one of them is read on at the other (Last-Event-ID).
#
#   nomad job run jobs/ingress.nomad.hcl
#
# The API has no authentication of its own: put a proxy before it, or keep it on a network you trust.
# Needs Nomad 1.1 and Consul.

variable "command" {
  default = "mesh"
}

variable "datacenters" {
  default = ["dc1"]
}

variable "data_dir" {
  description = "Tokenizers are read from the models here, and the token log is kept here: it outlives updates of this job."
  default     = "/var/lib/inference-mesh"
}

variable "consul" {
  default = "http://127.0.0.1:8500"
}

variable "port" {
  default = 8090
}

job "mesh-ingress" {
  type        = "service"
  datacenters = var.datacenters

  update {
    max_parallel     = 1
    health_check     = "checks"
    min_healthy_time = "10s"
    healthy_deadline = "3m"
    auto_revert      = true
  }

  group "ingress" {
    count = 2

    constraint {
      operator = "distinct_hosts"
      value    = "true"
    }

    affinity {
      attribute = "${node.class}"
      value     = "gateway"
      weight    = 50
    }

    network {
      port "grpc" {}
      port "api" {
        static = var.port
      }
    }

    restart {
      attempts = 3
      interval = "2m"
      delay    = "1s"
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
      name = "mesh-api"
      port = "api"
      check {
        type     = "http"
        port     = "api"
        path     = "/health"
        interval = "10s"
        timeout  = "2s"
      }
    }

    task "ingress" {
      driver = "raw_exec"
      config {
        command = var.command
        args    = ["agent"]
      }

      env {
        MESH_NAME       = "ingress-${NOMAD_ALLOC_INDEX}-${node.unique.name}"
        MESH_HOST       = "${attr.unique.network.ip-address}"
        MESH_PORT       = "${NOMAD_PORT_grpc}"
        MESH_API_HOST   = "${attr.unique.network.ip-address}"
        MESH_API_PORT   = "${NOMAD_PORT_api}"
        MESH_HOME       = var.data_dir
        MESH_DATA_DIR   = "${var.data_dir}/ingress"
        MESH_CONSUL     = var.consul
        MESH_SCHEDULER  = "off"
        MESH_MEMORY     = 1
        MESH_LOG_FORMAT = "json"
      }

      resources {
        cpu    = 300
        memory = 256
      }

      logs {
        max_files     = 3
        max_file_size = 10
      }

      kill_signal  = "SIGTERM"
      kill_timeout = "30s"
    }
  }
}
