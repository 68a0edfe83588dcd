{{/* Names and labels of every object. */}}

{{- define "galerne.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* A name of so many characters at most: one that is longer ends with its digest, because two that begin alike are two.
Argument: (list name most) */}}
{{- define "galerne.short" -}}
{{- $name := index . 0 -}}
{{- $most := index . 1 | int -}}
{{- if le (len $name) $most -}}
{{- $name -}}
{{- else -}}
{{- printf "%s-%s" (trunc (sub $most 9 | int) $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- end }}

{{/* KubeRay appends up to 30 characters to what it makes of this name, and a label ends at 63. */}}
{{- define "galerne.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- include "galerne.short" (list (.Values.fullnameOverride | trimSuffix "-") 40) -}}
{{- else -}}
{{- $name := include "galerne.name" . -}}
{{- include "galerne.short" (list (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) 40) -}}
{{- end -}}
{{- end }}

{{/* Name of the release among all that one Prometheus watches: the label galerne_release of every series, rule and query. */}}
{{- define "galerne.release" -}}
{{- .Values.config.release | default (printf "%s/%s" .Release.Namespace .Release.Name) -}}
{{- end }}

{{/* Labels that never change: selectors use them, and pods have no others, because another label is another pod: with a
chart's version among them every release of the chart would replace a whole cluster. Argument: (list $ component) */}}
{{- define "galerne.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "galerne.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Labels of an object. Argument: (list $ component) */}}
{{- define "galerne.labels" -}}
{{- $root := index . 0 -}}
{{ include "galerne.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: galerne
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The product's image. */}}
{{- define "galerne.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- include "galerne.reference" (list .Values.image.repository $tag .Values.image.digest) -}}
{{- end }}

{{/* A group's image: its own, or the product's with what it says in place of it; a digest names one image only.
Argument: (list $ group) */}}
{{- define "galerne.groupImage" -}}
{{- $root := index . 0 -}}
{{- $own := (index . 1).image -}}
{{- if or $own.repository $own.tag $own.digest -}}
{{- $tag := $own.tag | default $root.Values.image.tag | default $root.Chart.AppVersion -}}
{{- include "galerne.reference" (list ($own.repository | default $root.Values.image.repository) $tag $own.digest) -}}
{{- else -}}
{{- include "galerne.image" $root -}}
{{- end -}}
{{- end }}

{{/* An image's reference. Argument: (list repository tag digest) */}}
{{- define "galerne.reference" -}}
{{- $tag := index . 1 -}}
{{- if has $tag (list "latest" "main" "master" "dev" "edge" "nightly" "stable" "") -}}
{{- fail (printf "the tag %q of image %s moves: name one that does not, such as 0.1.0" $tag (index . 0)) -}}
{{- end -}}
{{- printf "%s:%s" (index . 0) $tag -}}
{{- with index . 2 }}@{{ . }}{{ end -}}
{{- end }}

{{/* Nodes that a pod may run on. Argument: what has nodeSelector and tolerations */}}
{{- define "galerne.nodes" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "galerne.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Secrets by their purpose. */}}
{{- define "galerne.configSecret" -}}
{{- .Values.tenants.existingSecret | default (printf "%s-config" (include "galerne.fullname" .)) -}}
{{- end }}

{{- define "galerne.tokensSecret" -}}
{{- .Values.tokens.existingSecret | default (printf "%s-tokens" (include "galerne.fullname" .)) -}}
{{- end }}

{{- define "galerne.redisSecret" -}}
{{- if .Values.gcs.redisAddress -}}{{ .Values.gcs.passwordSecret.name }}{{- else -}}
{{- printf "%s-redis" (include "galerne.fullname" .) -}}
{{- end -}}
{{- end }}

{{- define "galerne.redisAddress" -}}
{{- if .Values.gcs.redisAddress -}}{{ .Values.gcs.redisAddress }}
{{- else if .Values.redis.enabled -}}{{ printf "%s-redis:6379" (include "galerne.fullname" .) }}
{{- end -}}
{{- end }}

{{/* Priority class by kind: serving or engines. Argument: (list $ kind) */}}
{{- define "galerne.priorityClass" -}}
{{- $root := index . 0 -}}
{{- if index $root.Values.priorityClasses (index . 1) }}
priorityClassName: {{ index $root.Values.priorityClasses (index . 1) }}
{{- else if $root.Values.priorityClasses.create }}
priorityClassName: {{ include "galerne.fullname" $root }}-{{ index . 1 }}
{{- end }}
{{- end }}

{{/* A text whose links to the runbook lead to where it is published. Argument: (list $ text) */}}
{{- define "galerne.withRunbook" -}}
{{- $root := index . 0 -}}
{{- index . 1 | replace "docs/runbook.md" ($root.Values.metrics.runbookUrl | default "docs/runbook.md") -}}
{{- end }}
