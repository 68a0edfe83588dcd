{{/* What all of Ray's pods have in common. */}}

{{/* Ray's version, which serving/cluster/ray.py is pinned to. A test holds it against pyproject.toml. */}}
{{- define "galerne.rayVersion" -}}2.60.0{{- end }}

{{/* The variables that `galerne serve` sets on one machine. tests/helm/test_environment.py holds both against each
other. Nothing here follows what `config` says of models and gateways: another value is another pod, and KubeRay makes a second
cluster for it. Argument: (dict "root" $ "cpu" processors-of-the-pod "gpus" GPUs-of-the-pod) */}}
{{- define "galerne.environment" -}}
{{- $root := .root -}}
{{- $limits := dig "limits" dict $root.Values.config -}}
{{- /* No process of the cluster reports to anybody, and engines never go out. */}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
- {name: VLLM_DO_NOT_TRACK, value: "1"}
- {name: DO_NOT_TRACK, value: "1"}
- {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: TRANSFORMERS_OFFLINE, value: "1"}
{{- /* HAProxy to the gateway directly, one event loop. */}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: "1"}
- {name: RAY_SERVE_HAPROXY_NBTHREAD, value: {{ min 4 (max 1 (div (.cpu | int64) 2)) | quote }}}
- {name: RAY_SERVE_HAPROXY_MAXCONN, value: {{ $root.Values.gateway.maxConnections | int64 | quote }}}
- {name: RAY_SERVE_HAPROXY_BINARY_PATH, value: {{ include "galerne.bin" $root }}/galerne-haproxy}
- {name: RAY_SERVE_HAPROXY_CONFIG_FILE_LOC, value: /run/galerne/h/haproxy.cfg}
- {name: RAY_SERVE_HAPROXY_SOCKET_PATH, value: /run/galerne/h/admin.sock}
- {name: RAY_SERVE_HAPROXY_METRICS_ENABLED, value: "0"}
- {name: RAY_SERVE_HAPROXY_SERVER_STATE_BASE, value: /run/galerne/h}
- {name: RAY_SERVE_HAPROXY_SERVER_STATE_FILE, value: /run/galerne/h/server-state}
- {name: RAY_SERVE_HAPROXY_METRICS_PORT, value: "9101"}
- {name: RAY_SERVE_HAPROXY_TUNE_BUFSIZE, value: {{ max 16384 (mul 4 (dig "header_bytes" 8192 $limits | int64)) | quote }}}
- {name: RAY_SERVE_PORT_QUARANTINE_S, value: "300"}
- {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: "serving.api.threshold:middlewares"}
- {name: FORWARDED_ALLOW_IPS, value: ""}
- {name: RAY_SERVE_FALLBACK_PROXY_HTTP_PORT, value: "8500"}
- {name: GALERNE_HAPROXY_HOST, value: "0.0.0.0"}
- {name: GALERNE_HAPROXY_HEADER_BYTES, value: {{ dig "header_bytes" 8192 $limits | int64 | quote }}}
- {name: GALERNE_HAPROXY_BODY_BYTES, value: {{ dig "body_bytes" 4194304 $limits | int64 | quote }}}
- {name: GALERNE_HAPROXY_SOURCE_CONNECTIONS, value: {{ $root.Values.gateway.connectionsPerSource | int64 | default (div ($root.Values.gateway.maxConnections | int64) 4) | quote }}}
- {name: GALERNE_HAPROXY_TRUSTED_PROXIES, value: {{ join " " $root.Values.gateway.trustedProxies | quote }}}
- {name: VLLM_MAX_STOP_STRINGS, value: {{ dig "stop_sequences" 16 $limits | int64 | quote }}}
- {name: RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT, value: "1000000"}
- {name: RAY_SERVE_LOG_CLIENT_ADDRESS, value: "0"}
- {name: RAY_SERVE_LOG_TO_STDERR, value: "0"}
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
{{- /* Idle workers that wait for tasks: here every worker is an actor of its own. */}}
- {name: RAY_prestart_worker_first_driver, value: "0"}
- {name: RAY_enable_worker_prestart, value: "0"}
{{- if not .gpus }}
{{ include "galerne.noGpus" $root }}
{{- end }}
{{- /* The pods' own: what guards the engines' ports, the address workers of one engine meet at, places to write. */}}
- {name: GALERNE_RELEASE, value: {{ include "galerne.release" $root | quote }}}
- name: GALERNE_ENGINE_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "galerne.tokensSecret" $root }}, key: engine_token}}
- name: VLLM_HOST_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: GALERNE_CACHE, value: {{ ternary "/models/galerne" "/var/lib/galerne/models" (not (empty $root.Values.weights.volume)) }}}
{{- if $root.Values.weights.volume }}
- {name: HF_HOME, value: /models/hub}
{{- end }}
- {name: HOME, value: /var/lib/galerne}
- {name: VLLM_CACHE_ROOT, value: /var/lib/galerne/vllm}
{{- end }}

{{/* Where NVIDIA's runtime is the nodes' default, a pod that asks for no GPU would see all of them: the image says `all`. */}}
{{- define "galerne.noGpus" -}}
- {name: NVIDIA_VISIBLE_DEVICES, value: void}
{{- end }}

{{/* Where the image has the product's programs. */}}
{{- define "galerne.bin" -}}/opt/galerne/bin{{- end }}

{{/* Ports of Ray's own, pinned so that network policies can name them. */}}
{{- define "galerne.rayPorts" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "10002"
max-worker-port: "19999"
{{- end }}

{{/* Weights are for engines: gateways and the head read none, and a volume may be on the engines' nodes alone.
Argument: (list $ whether-with-weights) */}}
{{- define "galerne.mounts" -}}
{{- $root := index . 0 -}}
- {name: config, mountPath: /etc/galerne, readOnly: true}
{{- if $root.Values.tenants.fileSecret }}
- {name: tenants, mountPath: {{ dir (include "galerne.tenantsPath" $root) }}, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/galerne}
- {name: haproxy, mountPath: /run/galerne/h}
{{- if and (index . 1) $root.Values.weights.volume }}
- {name: weights, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{/* Ray's sessions and sockets are below /tmp; caches, what vLLM compiles among them, in the home that the image names.
Every directory that is written to belongs to one pod and goes with it. Argument: (list $ scratch whether-with-weights) */}}
{{- define "galerne.volumes" -}}
{{- $root := index . 0 -}}
- name: config
  secret:
    secretName: {{ include "galerne.configSecret" $root }}
    defaultMode: 0440
    items: [{key: galerne.yaml, path: galerne.yaml}]
{{- with $root.Values.tenants.fileSecret }}
- name: tenants
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items: [{key: tenants.yaml, path: tenants.yaml}]
{{- end }}
- name: tmp
  emptyDir: {sizeLimit: {{ index . 1 }}}
- name: home
  emptyDir: {sizeLimit: {{ index . 1 }}}
- name: haproxy
  emptyDir: {sizeLimit: 64Mi}
{{- if and (index . 2) $root.Values.weights.volume }}
- name: weights
  {{- toYaml $root.Values.weights.volume | nindent 2 }}
{{- end }}
{{- end }}

{{/* Ray's agent says whether the node is well; it answers without a token. */}}
{{- define "galerne.nodeProbes" -}}
startupProbe:
  httpGet: {path: /api/healthz, port: 52365}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
{{- end }}

{{/* Before a pod ends: Serve moves its replicas away, and streams in flight finish. Argument: $ */}}
{{- define "galerne.preStop" -}}
preStop:
  exec:
    command:
      - {{ include "galerne.bin" . }}/python
      - -m
      - serving.cluster.node_drain
      - {{ add (.Values.drainSeconds | int64) 30 | quote }}
{{- end }}
