{{/* What Ray Serve is told: the same application as `galerne serve` deploys on one machine. */}}
{{- define "galerne.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
  keep_alive_timeout_s: 120
logging_config:
  log_level: WARNING
  enable_access_log: false
applications:
  - name: galerne
    route_prefix: /
    import_path: deployments.app:build
    args:
      config_path: {{ include "galerne.configPath" . }}
      # A new one makes Serve build the application again, from a file that says the same.
      revision: {{ include "galerne.revision" . | quote }}
    deployments:
      - name: gateway
        ray_actor_options:
          num_cpus: 0
          resources: {galerne_gateway: 1}
{{- end }}
