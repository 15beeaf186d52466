# The churn simulator as a job to dispatch: what would this mesh have held?
#
#   nomad job run jobs/churn-simulation.nomad.hcl
#   nomad job dispatch -meta scenario=drone-swarm -meta nodes=40 -meta hours=2 -meta seed=7 churn-simulation
#   nomad alloc fs ALLOCATION alloc/data/report.html > report.html
#
# Needs Nomad 1.1 (parameterized jobs are older than that).

variable "command" {
  default = "mesh"
}

variable "datacenters" {
  default = ["dc1"]
}

job "churn-simulation" {
  type        = "batch"
  datacenters = var.datacenters

  parameterized {
    payload       = "forbidden"
    meta_required = ["scenario", "nodes", "hours"]
    meta_optional = ["seed"]
  }

  # What is not given.
  meta {
    seed = "1"
  }

  group "simulation" {
    # A run is the same each time: one that failed fails again.
    restart {
      attempts = 0
      mode     = "fail"
    }

    reschedule {
      attempts  = 0
      unlimited = false
    }

    # The report and its figures stay until the allocation is collected.
    ephemeral_disk {
      size = 200
    }

    task "simulate" {
      driver = "raw_exec"
      config {
        command = var.command
        args = [
          "simulate", "${NOMAD_META_scenario}",
          "--seed", "${NOMAD_META_seed}",
          "--time", "${NOMAD_META_hours}h",
          "--set", "nodes=${NOMAD_META_nodes}",
          "--page", "${NOMAD_ALLOC_DIR}/data/report.html",
          "--json",
        ]
      }

      # One core; a thousand nodes take about 700 MB.
      resources {
        cpu    = 1000
        memory = 1024
      }

      logs {
        max_files     = 2
        max_file_size = 10
      }
    }
  }
}
