{{/* Pod Security "restricted", and a root file system that cannot be written to. */}}

{{- define "galerne.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser | int64 }}
runAsGroup: {{ .Values.security.runAsUser | int64 }}
fsGroup: {{ .Values.security.runAsUser | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Repeated where it may be: KubeRay copies a container's own context to what it adds. */}}
{{- define "galerne.containerSecurity" -}}
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Limits that are requests: what is promised is there. Argument: (dict "cpu" … "memory" … "scratch" … "more" …) */}}
{{- define "galerne.resources" -}}
{{- range $part := list "requests" "limits" }}
{{ $part }}:
  cpu: {{ $.cpu | quote }}
  memory: {{ $.memory }}
  {{- with $.scratch }}
  ephemeral-storage: {{ . }}
  {{- end }}
  {{- range $name, $count := $.more }}
  {{ $name }}: {{ $count | int64 | quote }}
  {{- end }}
{{- end }}
{{- end }}
