# smollm2-135m@b179c9523d0e as the mesh would place it, rendered by 'mesh job render'.
# Groups are ranges of layers, counts are replicas. A change of affinities restarts a group in Nomad: leave them
# as they are until another version is rolled out. Needs Nomad 1.1 and Consul.
job "smollm2-135m" {
  type        = "service"
  namespace   = "default"
  datacenters = ["dc1"]
  meta = {
    "mesh.model"    = "smollm2-135m"
    "mesh.digest"   = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    "mesh.managed"  = "true"
    "mesh.counts"   = "operator"
    "mesh.renderer" = "1"
    "mesh.rendered" = "1fc6e0dfb07b2c91"
  }
  update {
    max_parallel      = 1
    canary            = 1
    auto_revert       = true
    health_check      = "checks"
    min_healthy_time  = "5s"
    healthy_deadline  = "600s"
    progress_deadline = "900s"
  }

  group "layers-0-15" {
    count = 2
    constraint {
      operator = "distinct_hosts"
      value    = "true"
    }
    restart {
      attempts = 3
      interval = "120s"
      delay    = "5s"
      mode     = "fail"
    }
    reschedule {
      delay          = "5s"
      delay_function = "exponential"
      max_delay      = "300s"
      unlimited      = true
    }
    migrate {
      max_parallel     = 1
      health_check     = "checks"
      min_healthy_time = "5s"
      healthy_deadline = "600s"
    }
    ephemeral_disk {
      size = 20
    }
    scaling {
      enabled = true
      min     = 1
      max     = 64
      policy {}
    }
    network {
      port "health" {}
    }
    service {
      name = "mesh-lease"
      port = "health"
      tags = ["smollm2-135m", "layers-0-15"]
      check {
        type     = "tcp"
        port     = "health"
        interval = "5s"
        timeout  = "2s"
      }
    }
    task "lease" {
      driver       = "raw_exec"
      kill_timeout = "15s"
      config {
        command = "mesh"
        args    = ["lease", "smollm2-135m@b179c9523d0e:0-15", "--agent", "${attr.unique.network.ip-address}:7070", "--cluster", "default", "--runtime", "onnx", "--quantization", "int8", "--sessions", "4", "--context", "2048", "--health", "${NOMAD_ADDR_health}"]
      }
      resources {
        cpu    = 50
        memory = 214
      }
      logs {
        max_files     = 2
        max_file_size = 5
      }
    }
  }

  group "layers-15-30" {
    count = 2
    constraint {
      operator = "distinct_hosts"
      value    = "true"
    }
    restart {
      attempts = 3
      interval = "120s"
      delay    = "5s"
      mode     = "fail"
    }
    reschedule {
      delay          = "5s"
      delay_function = "exponential"
      max_delay      = "300s"
      unlimited      = true
    }
    migrate {
      max_parallel     = 1
      health_check     = "checks"
      min_healthy_time = "5s"
      healthy_deadline = "600s"
    }
    ephemeral_disk {
      size = 20
    }
    scaling {
      enabled = true
      min     = 1
      max     = 64
      policy {}
    }
    network {
      port "health" {}
    }
    service {
      name = "mesh-lease"
      port = "health"
      tags = ["smollm2-135m", "layers-15-30"]
      check {
        type     = "tcp"
        port     = "health"
        interval = "5s"
        timeout  = "2s"
      }
    }
    task "lease" {
      driver       = "raw_exec"
      kill_timeout = "15s"
      config {
        command = "mesh"
        args    = ["lease", "smollm2-135m@b179c9523d0e:15-30", "--agent", "${attr.unique.network.ip-address}:7070", "--cluster", "default", "--runtime", "onnx", "--quantization", "int8", "--sessions", "4", "--context", "2048", "--health", "${NOMAD_ADDR_health}"]
      }
      resources {
        cpu    = 50
        memory = 214
      }
      logs {
        max_files     = 2
        max_file_size = 5
      }
    }
  }
}
