"""The words of the board's fields (label, hint), in each of its languages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
Field = tuple[str, str]

FIELDS: dict[str, dict[str, Field]] = {
    "en": {
        "dpo_label_smoothing": ("Label smoothing", "Expected share of pairs whose labels are swapped."),
        "simpo_gamma": ("SimPO gamma", "Target margin between the chosen and the rejected response."),
        "dpop_lambda": (
            "DPOP lambda",
            "Weight of the penalty when the chosen response is less likely than under the reference.",
        ),
        "discopop_tau": ("DiscoPOP tau", "The smaller, the sharper the change from DPO's loss to the exponential one."),
        "sr_lambda": ("Refinement lambda", "Weight of the refinement term. 0 turns it off."),
        "ipo_length_normalize": ("Length normalization", "true: average over tokens. false: sum over tokens."),
        "ld_alpha": ("LD alpha", "Weight of the longer response's extra tokens (LD-DPO)."),
        "pref_bco_weight": ("BCO weight", "Weight of an added BCO loss. 0 turns it off."),
        "pref_loss_args": ("Loss arguments", "Keyword arguments of your loss, as JSON."),
        "sr_prompt": (
            "Refinement prompt",
            "The refinement term puts this text before the query. Clear the field to restore the default.",
        ),
        "ref_model": ("Reference model", "Path or hub name. Empty: the model you start from."),
        "precompute_ref_log_probs": (
            "Reference cache",
            "Compute the reference's log-probabilities before training. auto: where it does not change the result.",
        ),
        "ref_log_probs_cache_dir": ("Reference cache folder", "Empty: a folder in the user's cache."),
        "share_prefix": (
            "Share prefix",
            "Compute the shared prefix of both responses once. auto: where it does not change the result.",
        ),
        "pref_loss_file": ("Loss file", "Python file that registers your own loss. Press Enter to read it."),
        "pref_stop_on_degeneration": (
            "Stop on degeneration",
            "If the run degenerates, save a checkpoint and stop.",
        ),
        "odpo_alpha": ("ODPO alpha", "Weight of the offset from the data's scores."),
        "rrhf_weight": ("RRHF weight", "Weight of the hinge, beside SFT."),
        "cringe_alpha": ("CRINGE alpha", "Weight of the contrast of rejected tokens, beside SFT."),
        "cringe_bias": ("CRINGE bias", "Margin in nats at which the gate is half closed."),
        "cringe_tau": ("CRINGE tau", "Temperature of the gate, in nats. The smaller, the more abruptly it closes."),
        "cringe_top_k": ("CRINGE top k", "The contrast draws from this many of the model's most likely tokens."),
        "f_divergence": ("f-divergence", "Divergence from the reference. reverse_kl: as in DPO."),
        "f_divergence_alpha": ("Divergence alpha", "Alpha of the alpha-divergence."),
        "pref_wpo": ("WPO", "Weights pairs by how likely the policy itself writes them."),
        "ld_alpha_reference": ("LD alpha for the reference", "Weight the reference's extra tokens by LD alpha, too."),
        "pref_weight_column": ("Weight column", "Column of the data with the weight of each pair."),
        "pref_margin_column": (
            "Score columns",
            "Columns of the data with the scores of the chosen and rejected response, or one with their difference.",
        ),
        "pref_ranked_weights": (
            "Ranked pair weights",
            "Weights of the pairs of a row with more than two answers. score_gap: by the difference of their scores.",
        ),
        "pref_loss_weights": ("Loss weights", "A weight for each of several losses, separated by commas."),
        "reward_viewer": ("Normalized rewards", ""),
    },
    "ru": {
        "dpo_label_smoothing": ("Сглаживание меток", "Ожидаемая доля пар, в которых ответы перепутаны местами."),
        "simpo_gamma": ("Гамма SimPO", "Целевой отрыв выбранного ответа от отвергнутого."),
        "dpop_lambda": (
            "Лямбда DPOP",
            "Вес штрафа за выбранные ответы, которые стали менее вероятными, чем у эталонной модели.",
        ),
        "discopop_tau": ("Тау DiscoPOP", "Чем меньше, тем резче переход от функции потерь DPO к экспоненциальной."),
        "sr_lambda": ("Лямбда уточнения", "Вес уточняющего слагаемого. 0 отключает его."),
        "ipo_length_normalize": ("Нормировка по длине", "true: среднее по токенам. false: сумма по токенам."),
        "ld_alpha": ("Альфа LD", "Вес лишних токенов более длинного ответа (LD-DPO)."),
        "pref_bco_weight": ("Вес BCO", "Вес добавляемой функции потерь BCO. 0 отключает её."),
        "pref_loss_args": ("Аргументы функции потерь", "Именованные аргументы вашей функции потерь в формате JSON."),
        "sr_prompt": (
            "Промпт уточнения",
            "Уточняющее слагаемое ставит этот текст перед запросом. Очистите поле, чтобы вернуть текст по умолчанию.",
        ),
        "ref_model": ("Эталонная модель", "Путь или имя в хабе. Пусто: модель, с которой начинается обучение."),
        "precompute_ref_log_probs": (
            "Кэш эталонной модели",
            "Вычислить логарифмы вероятностей эталона заранее и хранить на диске. auto: если это не меняет результат.",
        ),
        "ref_log_probs_cache_dir": ("Папка кэша эталона", "Пусто: папка в кэше пользователя."),
        "share_prefix": (
            "Общий префикс",
            "Вычислять общий префикс обоих ответов один раз. auto: если это не меняет результат.",
        ),
        "pref_loss_file": (
            "Файл функции потерь",
            "Файл Python, который регистрирует вашу функцию потерь. Нажмите Enter, чтобы прочитать его.",
        ),
        "pref_stop_on_degeneration": (
            "Остановка при вырождении",
            "Если обучение вырождается, сохранить контрольную точку и остановиться.",
        ),
        "odpo_alpha": ("Альфа ODPO", "Вес сдвига, который даёт разность оценок из данных."),
        "rrhf_weight": ("Вес RRHF", "Вес кусочно-линейного штрафа рядом с SFT."),
        "cringe_alpha": ("Альфа CRINGE", "Вес контраста отвергнутых токенов рядом с SFT."),
        "cringe_bias": ("Сдвиг CRINGE", "Отрыв в натах, при котором затвор закрыт наполовину."),
        "cringe_tau": ("Тау CRINGE", "Температура затвора в натах. Чем меньше, тем резче он закрывается."),
        "cringe_top_k": ("Top k CRINGE", "Из скольких вероятнейших токенов модели выбирается токен для контраста."),
        "f_divergence": ("f-расхождение", "Расхождение с эталонной моделью. reverse_kl: как в DPO."),
        "f_divergence_alpha": ("Альфа расхождения", "Альфа альфа-расхождения."),
        "pref_wpo": ("Взвешивание WPO", "Взвешивает пары по тому, насколько вероятно, что модель сама их напишет."),
        "ld_alpha_reference": ("Альфа LD для эталона", "Взвешивать лишние токены и у эталонной модели."),
        "pref_weight_column": ("Столбец весов", "Столбец данных с весом каждой пары."),
        "pref_margin_column": (
            "Столбцы оценок",
            "Столбцы данных с оценками выбранного и отвергнутого ответа или один с их разностью.",
        ),
        "pref_ranked_weights": (
            "Веса пар в строке",
            "Веса пар в строке, где больше двух ответов. score_gap: по разности их оценок.",
        ),
        "pref_loss_weights": ("Веса функций потерь", "Вес каждой из нескольких функций потерь, через запятую."),
        "reward_viewer": ("Нормированные награды", ""),
    },
    "zh": {
        "dpo_label_smoothing": ("标签平滑", "预计标注颠倒的样本对所占比例。"),
        "simpo_gamma": ("SimPO gamma", "被选回答与被拒回答之间的目标间隔。"),
        "dpop_lambda": ("DPOP lambda", "被选回答的概率低于参考模型时的惩罚权重。"),
        "discopop_tau": ("DiscoPOP 的 tau", "越小，从 DPO 损失到指数损失的过渡越急。"),
        "sr_lambda": ("修正项 lambda", "修正项的权重。0 表示关闭。"),
        "ipo_length_normalize": ("长度归一化", "true：对词元取平均。false：对词元求和。"),
        "ld_alpha": ("LD alpha", "较长回答多出的词元的权重（LD-DPO）。"),
        "pref_bco_weight": ("BCO 权重", "附加的 BCO 损失的权重。0 表示关闭。"),
        "pref_loss_args": ("损失函数参数", "自定义损失函数的关键字参数，JSON 格式。"),
        "sr_prompt": ("修正项提示词", "修正项把这段文本放在问题之前。清空即恢复默认文本。"),
        "ref_model": ("参考模型", "路径或模型名称。留空：训练的起始模型。"),
        "precompute_ref_log_probs": (
            "参考模型缓存",
            "预先计算参考模型的对数概率并保存到磁盘。auto：在不改变结果时启用。",
        ),
        "ref_log_probs_cache_dir": ("参考缓存目录", "留空：用户缓存目录中的文件夹。"),
        "share_prefix": ("共享前缀", "两个回答的共享前缀只计算一次。auto：在不改变结果时启用。"),
        "pref_loss_file": ("损失函数文件", "注册自定义损失函数的 Python 文件。按回车读取。"),
        "pref_stop_on_degeneration": ("退化时停止", "训练退化时保存检查点并停止。"),
        "odpo_alpha": ("ODPO 的 alpha", "由数据评分得出的偏移量的权重。"),
        "rrhf_weight": ("RRHF 权重", "合页损失相对于 SFT 的权重。"),
        "cringe_alpha": ("CRINGE 的 alpha", "被拒词元对比项相对于 SFT 的权重。"),
        "cringe_bias": ("CRINGE 的偏置", "门控半关时的间隔，单位为 nat。"),
        "cringe_tau": ("CRINGE 的 tau", "门控的温度，单位为 nat。越小，关闭越急。"),
        "cringe_top_k": ("CRINGE 的 top k", "对比词元取自模型概率最高的多少个词元。"),
        "f_divergence": ("f 散度", "相对参考模型的散度。reverse_kl：与 DPO 相同。"),
        "f_divergence_alpha": ("散度的 alpha", "alpha 散度的 alpha。"),
        "pref_wpo": ("WPO 加权", "按策略模型自身写出样本对的概率加权。"),
        "ld_alpha_reference": ("参考模型的 LD alpha", "对参考模型中多出的词元也按 LD alpha 加权。"),
        "pref_weight_column": ("权重列", "数据中各样本对权重所在的列。"),
        "pref_margin_column": ("评分列", "数据中被选回答与被拒回答的评分所在的两列，或二者之差所在的一列。"),
        "pref_ranked_weights": (
            "排序样本对的权重",
            "一行有两个以上回答时各样本对的权重。score_gap：按评分之差。",
        ),
        "pref_loss_weights": ("损失权重", "多个损失各自的权重，以逗号分隔。"),
        "reward_viewer": ("归一化奖励", ""),
    },
    "ko": {
        "dpo_label_smoothing": ("레이블 스무딩", "레이블이 뒤바뀌었을 것으로 예상되는 쌍의 비율."),
        "simpo_gamma": ("SimPO 감마", "선택된 응답과 거부된 응답 사이의 목표 마진."),
        "dpop_lambda": ("DPOP 람다", "선택된 응답의 확률이 참조 모델보다 낮을 때의 페널티 가중치."),
        "discopop_tau": ("DiscoPOP 타우", "작을수록 DPO 로스에서 지수 로스로 급격하게 바뀝니다."),
        "sr_lambda": ("개선 항 람다", "개선 항의 가중치. 0이면 사용하지 않습니다."),
        "ipo_length_normalize": ("길이 정규화", "true: 토큰 평균. false: 토큰 합."),
        "ld_alpha": ("LD 알파", "더 긴 응답에서 초과하는 토큰의 가중치 (LD-DPO)."),
        "pref_bco_weight": ("BCO 가중치", "추가되는 BCO 로스의 가중치. 0이면 사용하지 않습니다."),
        "pref_loss_args": ("로스 인수", "사용자 로스 함수의 키워드 인수 (JSON)."),
        "sr_prompt": (
            "개선 항 프롬프트",
            "개선 항은 이 문장을 질문 앞에 붙입니다. 입력란을 비우면 기본값으로 돌아갑니다.",
        ),
        "ref_model": ("참조 모델", "경로 또는 허브 이름. 비워 두면 학습을 시작하는 모델을 씁니다."),
        "precompute_ref_log_probs": (
            "참조 모델 캐시",
            "참조 모델의 로그 확률을 미리 계산해 디스크에 저장합니다. auto: 결과가 바뀌지 않는 경우에만.",
        ),
        "ref_log_probs_cache_dir": ("참조 캐시 폴더", "비워 두면 사용자 캐시 안의 폴더를 씁니다."),
        "share_prefix": (
            "접두사 공유",
            "두 응답의 공통 접두사를 한 번만 계산합니다. auto: 결과가 바뀌지 않는 경우에만.",
        ),
        "pref_loss_file": ("로스 파일", "사용자 로스를 등록하는 Python 파일. Enter를 누르면 읽습니다."),
        "pref_stop_on_degeneration": ("퇴화 시 중지", "학습이 퇴화하면 체크포인트를 저장하고 중지합니다."),
        "odpo_alpha": ("ODPO 알파", "데이터의 점수에서 얻은 오프셋의 가중치."),
        "rrhf_weight": ("RRHF 가중치", "SFT에 더하는 힌지 로스의 가중치."),
        "cringe_alpha": ("CRINGE 알파", "SFT에 더하는 거부된 토큰의 대비의 가중치."),
        "cringe_bias": ("CRINGE 편향", "게이트가 절반 닫히는 마진 (nat)."),
        "cringe_tau": ("CRINGE 타우", "게이트의 온도 (nat). 작을수록 급격하게 닫힙니다."),
        "cringe_top_k": ("CRINGE top k", "대비할 토큰을 모델의 상위 몇 개 토큰에서 뽑을지 정합니다."),
        "f_divergence": ("f-발산", "참조 모델에 대한 발산. reverse_kl: DPO와 같습니다."),
        "f_divergence_alpha": ("발산의 알파", "알파 발산의 알파."),
        "pref_wpo": ("WPO 가중", "정책 모델이 스스로 쓸 확률에 따라 쌍에 가중치를 줍니다."),
        "ld_alpha_reference": ("참조 모델의 LD 알파", "참조 모델의 초과 토큰에도 LD 알파 가중치를 줍니다."),
        "pref_weight_column": ("가중치 열", "각 쌍의 가중치가 있는 데이터의 열."),
        "pref_margin_column": (
            "점수 열",
            "선택된 응답과 거부된 응답의 점수가 있는 데이터의 두 열, 또는 그 차이가 있는 한 열.",
        ),
        "pref_ranked_weights": (
            "순위 쌍의 가중치",
            "응답이 셋 이상인 행에서 각 쌍의 가중치. score_gap: 점수 차이에 비례합니다.",
        ),
        "pref_loss_weights": ("로스 가중치", "여러 로스 각각의 가중치. 쉼표로 구분합니다."),
        "reward_viewer": ("정규화된 보상", ""),
    },
    "ja": {
        "dpo_label_smoothing": ("ラベルスムージング", "ラベルが逆になっていると見込むペアの割合。"),
        "simpo_gamma": ("SimPO ガンマ", "選ばれた応答と拒否された応答の間の目標マージン。"),
        "dpop_lambda": ("DPOP ラムダ", "選ばれた応答の確率が参照モデルを下回ったときのペナルティの重み。"),
        "discopop_tau": ("DiscoPOP タウ", "小さいほど、DPO の損失から指数損失へ急に切り替わります。"),
        "sr_lambda": ("改善項のラムダ", "改善項の重み。0 で無効になります。"),
        "ipo_length_normalize": ("長さの正規化", "true：トークンの平均。false：トークンの合計。"),
        "ld_alpha": ("LD アルファ", "長い方の応答で超過するトークンの重み（LD-DPO）。"),
        "pref_bco_weight": ("BCO の重み", "追加する BCO 損失の重み。0 で無効になります。"),
        "pref_loss_args": ("損失関数の引数", "独自の損失関数のキーワード引数（JSON）。"),
        "sr_prompt": (
            "改善項のプロンプト",
            "改善項はこの文を質問の前に付けます。欄を空にすると既定の文に戻ります。",
        ),
        "ref_model": ("参照モデル", "パスまたはハブでの名前。空欄：学習を始めるモデル。"),
        "precompute_ref_log_probs": (
            "参照キャッシュ",
            "参照モデルの対数確率を事前に計算してディスクに保存します。auto：結果が変わらない場合のみ。",
        ),
        "ref_log_probs_cache_dir": ("参照キャッシュのフォルダ", "空欄：ユーザーのキャッシュ内のフォルダ。"),
        "share_prefix": (
            "接頭部の共有",
            "両方の応答に共通する接頭部を一度だけ計算します。auto：結果が変わらない場合のみ。",
        ),
        "pref_loss_file": ("損失関数ファイル", "独自の損失関数を登録する Python ファイル。Enter で読み込みます。"),
        "pref_stop_on_degeneration": ("退化時に停止", "学習が退化したらチェックポイントを保存して停止します。"),
        "odpo_alpha": ("ODPO アルファ", "データのスコアから得たオフセットの重み。"),
        "rrhf_weight": ("RRHF の重み", "SFT に加えるヒンジ損失の重み。"),
        "cringe_alpha": ("CRINGE アルファ", "SFT に加える、拒否されたトークンの対比の重み。"),
        "cringe_bias": ("CRINGE バイアス", "ゲートが半分閉じるマージン（nat）。"),
        "cringe_tau": ("CRINGE タウ", "ゲートの温度（nat）。小さいほど急に閉じます。"),
        "cringe_top_k": ("CRINGE の top k", "対比するトークンを、モデルの上位何個のトークンから選ぶか。"),
        "f_divergence": ("f ダイバージェンス", "参照モデルに対するダイバージェンス。reverse_kl：DPO と同じ。"),
        "f_divergence_alpha": ("ダイバージェンスのアルファ", "アルファダイバージェンスのアルファ。"),
        "pref_wpo": ("WPO の重み付け", "方策モデル自身が書く確率に応じてペアに重みを付けます。"),
        "ld_alpha_reference": (
            "参照モデルの LD アルファ",
            "参照モデルの超過トークンにも LD アルファの重みを付けます。",
        ),
        "pref_weight_column": ("重みの列", "各ペアの重みが入ったデータの列。"),
        "pref_margin_column": (
            "スコアの列",
            "選ばれた応答と拒否された応答のスコアが入ったデータの 2 列、またはその差の 1 列。",
        ),
        "pref_ranked_weights": (
            "順位付きペアの重み",
            "応答が 3 つ以上ある行での各ペアの重み。score_gap：スコアの差に比例します。",
        ),
        "pref_loss_weights": ("損失の重み", "複数の損失それぞれの重み。カンマで区切ります。"),
        "reward_viewer": ("正規化報酬", ""),
    },
}


def locales(langs: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """The fields' words as LLaMA-Factory's `LOCALES` has them: component -> language -> its properties."""
    return {name: {lang: _properties(*in_language(lang, FIELDS)[name]) for lang in langs} for name in FIELDS["en"]}


def _properties(label: str, hint: str) -> dict[str, str]:
    return {"label": label, "info": hint} if hint else {"label": label}


def in_language(lang: str, texts: Mapping[str, T]) -> T:
    """The texts in a language; in English where there are none."""
    return texts.get(lang, texts["en"])
