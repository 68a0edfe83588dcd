{{/* Galerne's configuration: the text that pods read, and the figures that pods are made from. */}}

{{/* Where pods find it. */}}
{{- define "galerne.configPath" -}}/etc/galerne/galerne.yaml{{- end }}

{{/* Where they find the tenants, where those lie in a Secret of their own. */}}
{{- define "galerne.tenantsPath" -}}/etc/galerne-tenants/tenants.yaml{{- end }}

{{/* The configuration, but for its tenants where they come from a store; `listen` is the pods' own. */}}
{{- define "galerne.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $_ := set $config "listen" (dict "host" "0.0.0.0" "port" 8000 "trusted_proxies" .Values.gateway.trustedProxies) -}}
{{- if .Values.tenants.externalSecret.enabled -}}{{- $config = omit $config "tenants" -}}{{- end -}}
{{- if .Values.tenants.fileSecret -}}{{- $_ := set $config "tenants_file" (include "galerne.tenantsPath" .) -}}{{- end -}}
{{- $gateways := include "galerne.gateways" . | fromJson -}}
{{- if not (dig "gateway" "replicas" "" $config) -}}
{{- $_ := set $config "gateway" (merge (dict "replicas" ($gateways.min | int64)) ($config.gateway | default dict)) -}}
{{- end -}}
{{- include "galerne.resolveAccelerators" $config -}}
{{- include "galerne.follow" (list . $config) -}}
{{- toYaml $config -}}
{{- end }}

{{/* What names this configuration: the text's digest, or the operator's word where the text is not the chart's. Tenants
and administrators are no part of it: gateways take them from the file while they run, and nothing is built again. */}}
{{- define "galerne.revision" -}}
{{- if .Values.tenants.existingSecret -}}
{{- .Values.tenants.revision -}}
{{- else -}}
{{- $fixed := omit (include "galerne.config" . | fromYaml) "tenants" "admins" -}}
{{- printf "%s%s" (toYaml $fixed) .Values.tenants.revision | sha256sum | trunc 16 -}}
{{- end -}}
{{- end }}

{{/* The file: its revision first, for pods that must not read the one before. */}}
{{- define "galerne.configFile" -}}
# revision: {{ include "galerne.revision" . }}
{{ include "galerne.config" . }}
{{- end }}

{{/* Least and most gateways, as {"min": …, "max": …}. Two where nothing is said: at a change of the configuration Serve ends
a gateway before it starts its successor, and a pod holds one. */}}
{{- define "galerne.gateways" -}}
{{- $replicas := dig "gateway" "replicas" 2 .Values.config -}}
{{- if kindIs "map" $replicas -}}
{{- dict "min" (dig "min" 1 $replicas) "max" $replicas.max | toJson -}}
{{- else -}}
{{- dict "min" $replicas "max" $replicas | toJson -}}
{{- end -}}
{{- end }}

{{/* Port at which the head says what was decided. */}}
{{- define "galerne.scalerPort" -}}
{{- (.Values.config.prometheus | default dict).scaler_port | default 9390 | int64 -}}
{{- end }}

{{/* The longest drain of a model, seconds. */}}
{{- define "galerne.longestDrain" -}}
{{- $longest := 0 -}}
{{- range .Values.config.models -}}
{{- $longest = max $longest (dig "drain_timeout_s" 600 .) -}}
{{- end -}}
{{- $longest | int64 -}}
{{- end }}

{{/* What a pod may take to end: the drain, Serve's margin, and the rest of the shutdown. */}}
{{- define "galerne.graceSeconds" -}}
{{- add (.Values.drainSeconds | int64) 60 -}}
{{- end }}

{{/* Refuses what would only fail on the cluster, and says what to set. */}}
{{- define "galerne.validate" -}}
{{- $values := .Values -}}
{{- if not $values.config.models -}}
{{- fail "config.models is empty: name at least one model, for example {id: demo, source: \"fake:demo\"}" -}}
{{- end -}}
{{- if and (not $values.config.tenants) (not $values.tenants.existingSecret) (not $values.tenants.externalSecret.enabled) (not $values.tenants.fileSecret) -}}
{{- fail "config.tenants is empty: name at least one tenant with the digest of a key (`galerne keys new` prints both), or set tenants.fileSecret, tenants.externalSecret or tenants.existingSecret" -}}
{{- end -}}
{{- if and $values.tenants.fileSecret (or $values.tenants.existingSecret $values.tenants.externalSecret.enabled) -}}
{{- fail "tenants.fileSecret excludes tenants.existingSecret and tenants.externalSecret: keep one" -}}
{{- end -}}
{{- if and $values.tenants.fileSecret $values.config.tenants -}}
{{- fail "config.tenants must be left out where tenants.fileSecret brings them" -}}
{{- end -}}
{{- if and $values.tenants.existingSecret $values.tenants.externalSecret.enabled -}}
{{- fail "tenants.existingSecret and tenants.externalSecret exclude each other: keep one" -}}
{{- end -}}
{{- if $values.tenants.externalSecret.enabled -}}
{{- if or (not $values.tenants.externalSecret.store) (not $values.tenants.externalSecret.remoteKey) -}}
{{- fail "tenants.externalSecret needs store and remoteKey" -}}
{{- end -}}
{{- if $values.config.tenants -}}
{{- fail "config.tenants must be left out where tenants.externalSecret brings them" -}}
{{- end -}}
{{- end -}}
{{- if not $values.workerGroups -}}
{{- fail "workerGroups is empty: name at least one, for example {cpu: {gpus: 0, min: 1}} for simulated engines" -}}
{{- end -}}
{{- range $name, $group := $values.workerGroups -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$" $name) -}}
{{- fail (printf "workerGroups.%s: a group's name is of lower-case letters, digits and hyphens, begins with a letter, does not end with a hyphen and has 30 characters at most" $name) -}}
{{- end -}}
{{- if has $name (list "head" "gateway") -}}
{{- fail (printf "workerGroups.%s: this name is the chart's own, choose another" $name) -}}
{{- end -}}
{{- $group := mergeOverwrite (deepCopy $values.workerGroupDefaults) (deepCopy ($group | default dict)) -}}
{{- with $group.image -}}
{{- if and .build (ne .build $values.image.build) (not (or .repository .tag .digest)) -}}
{{- fail (printf "workerGroups.%s.image.build is %s and its image is the one of image, whose build is %s: set image.tag of the group" $name .build $values.image.build) -}}
{{- end -}}
{{- end -}}
{{- if lt ($group.max | int64) ($group.min | int64) -}}
{{- fail (printf "workerGroups.%s: max (%d) is below min (%d)" $name ($group.max | int64) ($group.min | int64)) -}}
{{- end -}}
{{- if and (not $values.autoscaler.enabled) (not ($group.min | int64)) -}}
{{- fail (printf "workerGroups.%s.min is 0 and autoscaler.enabled is false: the group would never have a pod" $name) -}}
{{- end -}}
{{- end -}}
{{- range $model := $values.config.models -}}
{{- include "galerne.placeable" (list $ $model) -}}
{{- end -}}
{{- if gt (include "galerne.longestDrain" . | float64) (float64 $values.drainSeconds) -}}
{{- fail (printf "drainSeconds (%d) is below the longest drain_timeout_s of config.models (%s): pods would end before their streams; raise it (which replaces pods: upgrade.strategy)" ($values.drainSeconds | int64) (include "galerne.longestDrain" .)) -}}
{{- end -}}
{{- $gateways := include "galerne.gateways" . | fromJson -}}
{{- $connections := mul 2 ($gateways.max | int64) (dig "gateway" "max_ongoing_requests" 4096 $values.config | int64) -}}
{{- if gt (min 200000 $connections) ($values.gateway.maxConnections | int64) -}}
{{- fail (printf "gateway.maxConnections (%d) is below %d, twice what %d gateways accept (config.gateway.max_ongoing_requests each): raise it (which replaces pods: upgrade.strategy)" ($values.gateway.maxConnections | int64) (min 200000 $connections) ($gateways.max | int64)) -}}
{{- end -}}
{{- if and $values.networkPolicy.enabled $values.autoscaler.enabled (not $values.networkPolicy.apiServer) (not $values.networkPolicy.cilium) -}}
{{- fail "networkPolicy.apiServer is empty, and the autoscaler could not reach the API server: set it to its addresses as CIDRs (kubectl get endpointslice -n default kubernetes)" -}}
{{- end -}}
{{- if and $values.config.tracing $values.networkPolicy.enabled (not $values.networkPolicy.egress) -}}
{{- fail "config.tracing names a collector that network policies close off: open the way to it in networkPolicy.egress, for example [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: tracing}}}], ports: [{port: 4318, protocol: TCP}]}]" -}}
{{- end -}}
{{- $closed := and $values.networkPolicy.enabled (not $values.networkPolicy.egress) (not $values.networkPolicy.gatewayEgress) -}}
{{- range $values.config.oidc -}}
{{- if and .jwks_url $closed -}}
{{- fail (printf "config.oidc names %s, which network policies close off: open the way to it in networkPolicy.gatewayEgress, for example [{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [169.254.0.0/16]}}], ports: [{port: 443, protocol: TCP}]}], or give jwks_file" .jwks_url) -}}
{{- end -}}
{{- end -}}
{{- $limitsInRedis := hasPrefix "redis" (default "" $values.config.limits_store) -}}
{{- if and $limitsInRedis $closed -}}
{{- fail "config.limits_store names a Redis that network policies close off: open the way to it in networkPolicy.gatewayEgress, for example [{to: [{ipBlock: {cidr: 10.9.0.6/32}}], ports: [{port: 6379, protocol: TCP}]}]" -}}
{{- end -}}
{{- if and $values.limitsStore.passwordSecret.name (not $limitsInRedis) (not $values.tenants.existingSecret) -}}
{{- fail "limitsStore.passwordSecret is the password of a Redis, and config.limits_store names none: set it to redis://HOST:6379/0" -}}
{{- end -}}
{{- if and $values.ledger.existingSecret $closed -}}
{{- fail "ledger.existingSecret names a database that network policies close off: open the way to it in networkPolicy.gatewayEgress, for example [{to: [{ipBlock: {cidr: 10.9.0.5/32}}], ports: [{port: 5432, protocol: TCP}]}]" -}}
{{- end -}}
{{- if and $values.gcs.redisAddress $values.redis.enabled -}}
{{- fail "gcs.redisAddress names a Redis of yours: set redis.enabled to false" -}}
{{- end -}}
{{- if and $values.gcs.redisAddress (not $values.gcs.passwordSecret.name) -}}
{{- fail "gcs.passwordSecret.name is empty: a Redis without a password gives everyone who reaches it Ray's control store" -}}
{{- end -}}
{{- if eq $values.upgrade.strategy "NewClusterWithIncrementalUpgrade" -}}
{{- if not $values.autoscaler.enabled -}}
{{- fail "upgrade.strategy NewClusterWithIncrementalUpgrade needs autoscaler.enabled" -}}
{{- end -}}
{{- if not $values.upgrade.gatewayClassName -}}
{{- fail "upgrade.strategy NewClusterWithIncrementalUpgrade needs upgrade.gatewayClassName (kubectl get gatewayclass)" -}}
{{- end -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.host) -}}
{{- fail "ingress.host is empty: set the name that clients use" -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs is empty: name the Gateway, for example [{name: public, namespace: gateways}]" -}}
{{- end -}}
{{- if and $values.weights.prepare.enabled (not $values.weights.volume) -}}
{{- fail "weights.prepare needs weights.volume, where models are to lie" -}}
{{- end -}}
{{- $hub := false -}}
{{- range $values.config.models -}}{{- if hasPrefix "hf:" .source -}}{{- $hub = true -}}{{- end -}}{{- end -}}
{{- if and $values.weights.prepare.enabled (not $hub) -}}
{{- fail "weights.prepare.enabled fetches hf: sources, and no model in config.models has one: set it to false" -}}
{{- end -}}
{{- if and $hub (not $values.weights.volume) -}}
{{- fail "a model has an hf: source, and engines never go out: set weights.volume to a volume that holds it (path:/models/…), or that weights.prepare fills" -}}
{{- end -}}
{{- include "galerne.validateKeda" . -}}
{{- if and $values.loadtest.enabled (not $values.loadtest.keysSecret) -}}
{{- fail "loadtest.keysSecret is empty: name a Secret whose keys are the variables that the scenario's keys name" -}}
{{- end -}}
{{- end }}
