{{/* Names and checks of the stack. What is said of Galerne's own pods comes from its chart, in that chart's scope. */}}

{{/* Labels of an object. Argument: (list $ component) */}}
{{- define "stack.labels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: galerne-stack
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* What a Secret had before this upgrade, as a mapping of keys. Argument: (list $ name) */}}
{{- define "stack.known" -}}
{{- dig "data" dict (lookup "v1" "Secret" (index . 0).Release.Namespace (index . 1)) | toJson -}}
{{- end }}

{{/* Pods of a sub-chart as a policy selects them; each but Prometheus' and Alertmanager's, which their operator makes, has
the release's label, too. Argument: (list $ part) */}}
{{- define "stack.pods" -}}
{{- $root := index . 0 -}}
{{- $monitoring := index $root.Values "kube-prometheus-stack" "fullnameOverride" -}}
matchLabels:
{{- if eq (index . 1) "prometheus" }}
  operator.prometheus.io/name: {{ $monitoring }}-prometheus
{{- else if eq (index . 1) "alertmanager" }}
  alertmanager: {{ $monitoring }}-alertmanager
{{- else }}
  app.kubernetes.io/name: {{ index . 1 }}
  app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- end }}
{{- end }}

{{- define "stack.dnsRule" -}}
- to: {{- include "galerne.dnsPeer" .Subcharts.galerne | nindent 4 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}

{{/* Refuses parts whose values do not meet, and says what to set. */}}
{{- define "stack.validate" -}}
{{- $galerne := .Values.galerne -}}
{{- $monitoring := index .Values "kube-prometheus-stack" -}}
{{- $parts := list
  (dict "on" $monitoring.enabled "part" "kube-prometheus-stack" "value" "galerne.config.prometheus.url"
    "is" (get ($galerne.config.prometheus | default dict) "url") "wanted" (printf "http://%s-prometheus:9090" $monitoring.fullnameOverride)
    "else" "the address of yours, and galerne.networkPolicy.monitoringNamespace to its namespace")
  (dict "on" .Values.valkey.enabled "part" "valkey" "value" "galerne.config.limits_store"
    "is" ($galerne.config.limits_store | default "") "wanted" (printf "redis://%s:6379/0" .Values.valkey.fullnameOverride)
    "else" "that of yours, galerne.limitsStore.passwordSecret to its password and galerne.networkPolicy.gatewayEgress to the way there")
  (dict "on" .Values.postgres.enabled "part" "postgres" "value" "galerne.ledger.existingSecret"
    "is" $galerne.ledger.existingSecret "wanted" .Values.postgres.fullnameOverride
    "else" "a Secret with the address of yours and galerne.networkPolicy.gatewayEgress to the way there")
-}}
{{- range $parts -}}
{{- if and .on (ne .is .wanted) -}}
{{- fail (printf "%s.enabled is true, and %s is %q: set it to %q" .part .value .is .wanted) -}}
{{- end -}}
{{- if and (not .on) (eq .is .wanted) -}}
{{- fail (printf "%s.enabled is false, and %s still names it: set it to %s" .part .value .else) -}}
{{- end -}}
{{- end -}}
{{- if and (not (index .Values "kuberay-operator" "enabled")) (not $galerne.networkPolicy.operatorNamespace) $galerne.networkPolicy.enabled -}}
{{- fail "kuberay-operator.enabled is false: set galerne.networkPolicy.operatorNamespace to the namespace of yours, and operatorPodLabels to its pods' labels" -}}
{{- end -}}
{{- end }}
