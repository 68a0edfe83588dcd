{{/* Peers and ports of network policies. */}}

{{- define "galerne.dnsPeer" -}}
- namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ .Values.networkPolicy.dns.namespace }}}
  podSelector:
    matchLabels: {{- toYaml .Values.networkPolicy.dns.podLabels | nindent 6 }}
{{- range .Values.networkPolicy.dns.cidrs }}
- ipBlock: {cidr: {{ . }}}
{{- end }}
{{- end }}

{{/* Argument: (list $ component…) */}}
{{- define "galerne.own" -}}
- podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ include "galerne.name" (index . 0) }}
      app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
    matchExpressions:
      - {key: app.kubernetes.io/component, operator: In, values: [{{ rest . | join ", " }}]}
{{- end }}

{{/* Pods of a namespace, the release's own where it is empty; all of them where no labels are given.
Argument: (list $ namespace labels) */}}
{{- define "galerne.namespacePeer" -}}
- namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ index . 1 | default (index . 0).Release.Namespace }}}
  {{- with index . 2 }}
  podSelector:
    matchLabels: {{- toYaml . | nindent 6 }}
  {{- end }}
{{- end }}

{{/* The KubeRay operator. */}}
{{- define "galerne.operatorPeer" -}}
{{- include "galerne.namespacePeer" (list . .Values.networkPolicy.operatorNamespace .Values.networkPolicy.operatorPodLabels) -}}
{{- end }}

{{/* Prometheus. */}}
{{- define "galerne.prometheusPeer" -}}
{{- include "galerne.namespacePeer" (list . .Values.networkPolicy.monitoringNamespace .Values.networkPolicy.monitoringPodLabels) -}}
{{- end }}

{{/* Ports and addresses of the API server; nothing where no address is given, because a rule without peers opens everything. */}}
{{- define "galerne.apiServerRule" -}}
{{- with .Values.networkPolicy.apiServer -}}
- to:
    {{- range . }}
    - ipBlock: {cidr: {{ . }}}
    {{- end }}
  ports:
    - {port: 443, protocol: TCP}
    - {port: 6443, protocol: TCP}
{{- end }}
{{- end }}

{{/* The same way for Cilium, which by default matches no address of a node with an ipBlock. Argument: (list $ name labels selector) */}}
{{- define "galerne.apiServerCilium" -}}
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: {{ index . 1 }}
  labels: {{- index . 2 | nindent 4 }}
spec:
  endpointSelector: {{- index . 3 | nindent 4 }}
  egress:
    - toEntities: [kube-apiserver]
      toPorts:
        - ports:
            - {port: "443", protocol: TCP}
            - {port: "6443", protocol: TCP}
{{- end }}

{{/* What Ray's pods ask of one another: control (6379 on the head), raylets and object store, agents, workers, Serve's
gateways behind HAProxy, and what binds a free port: Serve's handles, engines, NCCL. Not 8265, 10001, 9101, 9390. Nor 8500,
Serve's own proxy on the head, which HAProxy would ask where no gateway is up: it would carry every stream through the pod
that holds the control store. HAProxy marks it as down, and answers 503 itself. */}}
{{- define "galerne.rayPeerPorts" -}}
- {port: 6379, endPort: 6383, protocol: TCP}
- {port: 10002, endPort: 19999, protocol: TCP}
- {port: 30000, endPort: 60999, protocol: TCP}
{{- end }}

{{/* Port of a URL. */}}
{{- define "galerne.urlPort" -}}
{{- $host := (urlParse .).host -}}
{{- if regexMatch ":[0-9]+$" $host -}}{{ regexFind "[0-9]+$" $host }}
{{- else -}}{{ ternary "443" "80" (hasPrefix "https:" .) }}
{{- end -}}
{{- end }}
